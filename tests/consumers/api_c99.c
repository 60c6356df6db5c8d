/* fst.h is C99, needs nothing before it, and every function that it declares is in the library. */
#include <fst.h>

struct all {
    const char *(*version)(void);
    const char *(*dtype_name)(fst_dtype);
    unsigned (*dtype_bits)(fst_dtype);
    fst_dtype (*dtype_from_name)(const char *);
    int (*dtype_can_cast)(fst_dtype, fst_dtype);
    const char *(*status_name)(fst_status);
    const fst_error *(*last_error)(void);
    fst_model *(*load_cast)(const char *const *, fst_dtype);
    fst_status (*load)(const char *const *, const fst_options *, fst_model **, fst_error *);
    fst_status (*open)(const char *const *, const fst_options *, fst_model **, fst_error *);
    void (*model_free)(fst_model *);
    void (*release_cached)(void);
    size_t (*model_count)(const fst_model *);
    fst_status (*model_at)(const fst_model *, size_t, fst_tensor *);
    fst_status (*model_find)(const fst_model *, const char *, fst_tensor *);
    size_t (*model_index)(const fst_model *, const char *);
    size_t (*model_file_count)(const fst_model *);
    const char *(*model_file_path)(const fst_model *, size_t);
    int (*model_has_metadata)(const fst_model *, size_t);
    size_t (*model_metadata_count)(const fst_model *, size_t);
    fst_status (*model_metadata_at)(const fst_model *, size_t, size_t, fst_string *, fst_string *);
    fst_status (*model_stats)(const fst_model *, fst_stats *);
    fst_status (*model_dlpack)(fst_model *, size_t, struct DLManagedTensorVersioned **);
    fst_status (*save)(const fst_model *, const char *, const fst_save_options *, fst_error *);
    fst_status (*convert_directory)(const char *, const char *, const fst_options *,
                                    const fst_convert_options *, fst_convert_stats *, fst_error *);
    const fst_shard_rule *(*shard_rules)(void);
    void (*shard_range)(uint64_t, uint64_t, unsigned, unsigned, uint64_t *, uint64_t *);
};

static const struct all all = {fst_version,
                               fst_dtype_name,
                               fst_dtype_bits,
                               fst_dtype_from_name,
                               fst_dtype_can_cast,
                               fst_status_name,
                               fst_last_error,
                               fst_load_cast,
                               fst_load,
                               fst_open,
                               fst_model_free,
                               fst_release_cached,
                               fst_model_count,
                               fst_model_at,
                               fst_model_find,
                               fst_model_index,
                               fst_model_file_count,
                               fst_model_file_path,
                               fst_model_has_metadata,
                               fst_model_metadata_count,
                               fst_model_metadata_at,
                               fst_model_stats,
                               fst_model_dlpack,
                               fst_save,
                               fst_convert_directory,
                               fst_shard_rules,
                               fst_shard_range};

/* 0 when the library gives an error for a file that is not there, as it should. */
int main(void) {
    const char *files[] = {"no such file.safetensors", NULL};
    fst_options options = FST_OPTIONS_INIT;
    fst_error error;
    fst_model *model = NULL;
    options.device = FST_DEVICE_CPU;
    return !(all.load(files, &options, &model, &error) == FST_E_IO && !model && error.status == FST_E_IO &&
             all.last_error()->status == FST_E_IO);
}
