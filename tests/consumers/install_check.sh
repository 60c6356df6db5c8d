#!/usr/bin/env bash
# Installs a build into an empty folder and uses it from there, as another project would: by CMake's
# find_package and by pkg-config.
#
#   install_check.sh BUILD_FOLDER VERSION C_COMPILER [GENERATOR]
set -euo pipefail

build=$1 version=$2 compiler=$3 generator=${4:-Unix Makefiles}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
prefix=$folder/prefix

# What libfst.so needs may be in folders that the system does not search (.deps). Whoever builds with those
# names them to the loader, and so does this. The build's own library has them as its run path.
# CMake pads that with colons, to the length of the installed one.
dependencies=$(objdump -p "$build/lib/libfst.so" | awk '$1 == "RUNPATH" || $1 == "RPATH" { sub(/:+$/, "", $2); print $2 }')
export LD_LIBRARY_PATH=$dependencies

cmake --install "$build" --prefix "$prefix" >"$folder/log" || { cat "$folder/log"; exit 1; }

mkdir "$folder/project"
cat >"$folder/project/main.c" <<'C'
#include <fst.h>
#include <stdio.h>
int main(void) { return puts(fst_version()) < 0; }
C
cat >"$folder/project/CMakeLists.txt" <<CMAKE
cmake_minimum_required(VERSION 3.21)
project(user LANGUAGES C)
find_package(fst $version REQUIRED)
add_executable(user main.c)
target_link_libraries(user PRIVATE fst::fst)
CMAKE

expect() {
    local got
    got=$("$@")
    [[ $got == "$version" ]] || { echo "$*: want $version, got $got" >&2; exit 1; }
}

cmake -S "$folder/project" -B "$folder/cmake" -G "$generator" -DCMAKE_C_COMPILER="$compiler" \
    -DCMAKE_PREFIX_PATH="$prefix" >"$folder/log" && cmake --build "$folder/cmake" >>"$folder/log" ||
    { cat "$folder/log"; exit 1; }
expect "$folder/cmake/user"

pc=$(find "$prefix" -name fst.pc)
flags() { PKG_CONFIG_PATH=$(dirname "$pc") pkg-config --define-variable=prefix="$prefix" "$@" fst; }
[[ $(flags --modversion) == "$version" ]]
read -ra compile <<<"$(flags --cflags)"
read -ra link <<<"$(flags --libs)"
"$compiler" "$folder/project/main.c" "${compile[@]}" "${link[@]}" -o "$folder/user"
library=$(dirname "$(find "$prefix" -name libfst.so)")
expect env LD_LIBRARY_PATH="$library:$dependencies" "$folder/user"

# Nothing but fst_* is exported, and nothing in the folder remembers where it was built.
others=$(nm -D --defined-only "$library/libfst.so" | awk '$3 !~ /^fst_/ && $2 != "A" { print $3 }')
[[ -z $others ]] || { echo "exported: $others" >&2; exit 1; }
objdump -p "$library/libfst.so" | grep -q 'SONAME *libfst\.so\.0$'
# A run path only to where the build found what libfst.so needs (.deps), never into the build itself.
path=$(objdump -p "$library/libfst.so" | awk '$1 == "RUNPATH" || $1 == "RPATH" { print $2 }')
[[ -z $path || $path == "$dependencies" ]] || { echo "a run path: $path" >&2; exit 1; }
if grep -rl -- "$build" "$prefix"; then echo "these name the build folder" >&2; exit 1; fi
