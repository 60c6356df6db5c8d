// fst.h is C++17 too, and its names are not mangled.
#include <fst.h>

#include <cstring>

int main() {
    const char *files[] = {"no such file.safetensors", nullptr};
    fst_options options = FST_OPTIONS_INIT;
    options.device = FST_DEVICE_GPU(0) - 1;
    fst_model *model = nullptr;
    fst_error error;
    bool failed = fst_load(files, &options, &model, &error) == FST_E_IO && !model;
    return !(failed && !std::strcmp(fst_dtype_name(FST_BF16), "BF16"));
}
