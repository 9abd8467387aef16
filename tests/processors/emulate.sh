#!/usr/bin/env bash
# emulate.sh arm64 FOLDER        Debian's Python for arm64, with wheels of the versions in constraints.txt
# emulate.sh x86-64-vN FOLDER    the Python of .venv and its packages, except those that compile kernels, on a
#                                processor of no more than that level (2 or 3)
#
# Makes FOLDER a virtual environment for another processor: its bin/python runs under qemu-user, and so do the
# processes that it starts as sys.executable. Nothing is installed outside of build/, and the host's settings of
# apt and dpkg stay as they are.
set -euo pipefail
processor=$1
repository=$(cd "$(dirname "$0")/../.." && pwd)
build=$repository/build
case $2 in /*) folder=$2 ;; *) folder=$PWD/$2 ;; esac

# Put Debian packages of an architecture, and what they depend on, into a folder: unpack ARCHITECTURE FOLDER NAME...
unpack() {
    if ! { command -v apt-get && command -v dpkg-deb; } >/dev/null; then
        echo "$0: packages for $1 come from Debian: run this on Debian, or install qemu-user yourself" >&2
        exit 1
    fi
    local state=$build/apt-$1 archive
    mkdir -p "$state"/{lists,archives}/partial "$2"
    local apt=(apt-get -qq -o "APT::Architecture=$1" -o "APT::Architectures=$1" -o APT::Sandbox::User=root
        -o Debug::NoLocking=1 -o "Dir::State=$state" -o "Dir::State::lists=$state/lists"
        -o Dir::State::status=/dev/null -o "Dir::Cache=$state" -o "Dir::Cache::archives=$state/archives")
    "${apt[@]}" update || true # some source may have nothing for this architecture
    "${apt[@]}" --yes --download-only --no-install-recommends install "${@:3}"
    for archive in "$state"/archives/*.deb; do
        dpkg-deb --extract "$archive" "$2"
    done
    rm -r "$state"
}

# The path of qemu for an architecture, which is fetched where it is not installed.
qemu() {
    local names=("qemu-$1" "qemu-$1-static") PATH=$PATH:$build/qemu
    if ! command -v "${names[@]}" >/dev/null; then
        unpack "$(dpkg --print-architecture)" "$build/qemu-package" qemu-user-static >&2
        mkdir -p "$build/qemu"
        mv "$build/qemu-package/usr/bin/qemu-$1"* "$build/qemu"
        rm -r "$build/qemu-package" # hundreds of megabytes
    fi
    command -v "${names[@]}" | head -n 1
}

# Have bin/python start an interpreter: start_by INTERPRETER EMULATOR ARGUMENT...
start_by() {
    mkdir -p "$folder/bin"
    printf 'home = %s\ninclude-system-site-packages = false\n' "$(dirname "$1")" >"$folder/pyvenv.cfg"
    printf '#!/bin/sh\nexec %q -0 "$0" %s %q "$@"\n' "$2" "${*:3}" "$1" >"$folder/bin/python"
    chmod +x "$folder/bin/python"
}

rm -rf "$folder"
if [[ $processor == arm64 ]]; then
    root=$folder/root
    emulator=$(qemu aarch64)
    unpack arm64 "$root" python3 libstdc++6
    [[ -e $root/lib ]] || ln -s usr/lib "$root/lib" # from Debian 13 on no package brings it
    interpreters=("$root"/usr/bin/python3.[0-9]*)
    version=${interpreters[0]##*/python}
    mapfile -t needed < <("$repository/.venv/bin/python" -c '
from importlib.metadata import requires
print(*(name for name in requires("deltaweights") if "extra ==" not in name), sep="\n")')
    packages=$folder/lib/python$version/site-packages
    "$repository/.venv/bin/pip" install --quiet --disable-pip-version-check --target "$packages" \
        --constraint "$repository/constraints.txt" --python-version "$version" --only-binary :all: \
        $(printf -- '--platform manylinux_2_%d_aarch64 ' {28..17}) --platform manylinux2014_aarch64 \
        "${needed[@]}" hypothesis pytest pytest-xdist safetensors
    echo "$repository" >"$packages/deltaweights.pth"
    # The oldest processor of 64 bits that is common: nothing may need more.
    start_by "${interpreters[0]}" "$emulator" -cpu cortex-a53 -L "$root"
else
    declare -A models=( # without what qemu would warn of
        [x86-64-v2]=Nehalem
        [x86-64-v3]=Haswell-noTSX,-invpcid,-pcid,-tsc-deadline,-x2apic
    )
    emulator=$(qemu x86_64)
    start_by "$(readlink -f "$repository/.venv/bin/python")" "$emulator" -cpu "${models[$processor]}"
    for found in "$repository"/.venv/lib/python*/site-packages; do
        packages=$folder/lib/$(basename "$(dirname "$found")")/site-packages
        mkdir -p "$packages"
        find "$found" -mindepth 1 -maxdepth 1 ! -name 'llvmlite*' ! -name 'numba*' -exec ln -st "$packages" {} +
    done
fi
"$folder/bin/python" -c 'import platform, numpy; print(platform.machine(), "with NumPy", numpy.__version__)'
