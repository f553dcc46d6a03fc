#!/usr/bin/env bash
# Installs what opd needs, from Debian's packages, where it is missing: tests/install.sh [build] [test] [full] [bench]
#
#   build  to build the daemon, opctl and libopd
#   test   to run the tests as well
#   full   clang, for tests/run --full
#   bench  gRPC for C++ and PyTorch, which the benchmarks compare with where they are
#
# Without a word: build and test. It says what it does, and does nothing when all is there. As another user than root it uses sudo.
set -euo pipefail

build=(gcc libc6-dev cmake ninja-build pkg-config libuv1-dev libprotobuf-c-dev protobuf-c-compiler protobuf-compiler libyaml-dev
	libcjson-dev libssl-dev)
test=(check libsubunit-dev openssl python3 python3-protobuf python3-numpy binutils procps)
full=(clang)
bench=(g++ libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc python3-torch)
# Libraries that providers wrap, and hwloc. Nothing needs them to be built or to pass: modules say what they miss. So a failure to get them is none.
optional=(libopenblas0-pthread libdnnl-dev opencl-headers libhwloc-dev)
# An OpenCL device for machines without a GPU: large, and of use to the tests alone.
optional_test=(ocl-icd-libopencl1 pocl-opencl-icd)

is_installed() {
	[ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$1" 2>/dev/null)" = 'ii ' ]
}

as_root() {
	if [ "$(id -u)" -eq 0 ]; then
		"$@"
	else
		sudo "$@"
	fi
}

# The names that aren't installed yet, one a line.
missing() {
	local name
	for name in "$@"; do
		is_installed "$name" || echo "$name"
	done
}

install_needed() {
	echo "install: ${*}"
	as_root apt-get update -q
	as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

wanted=()
[ $# -gt 0 ] || set -- build test
for word in "$@"; do
	case $word in
	build) wanted+=("${build[@]}") ;;
	test)
		wanted+=("${test[@]}")
		optional+=("${optional_test[@]}")
		;;
	full) wanted+=("${full[@]}") ;;
	bench) wanted+=("${bench[@]}") ;;
	*)
		echo "install: no such word: $word (build, test, full, bench)" >&2
		exit 2
		;;
	esac
done

if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
	echo "install: this is no Debian. Install what these packages hold, in your system's names: ${wanted[*]}"
	exit 0
fi
mapfile -t needed < <(missing "${wanted[@]}")
[ ${#needed[@]} -eq 0 ] || install_needed "${needed[@]}"
mapfile -t needed < <(missing "${optional[@]}")
[ ${#needed[@]} -eq 0 ] || install_needed "${needed[@]}" || echo "install: went on without ${needed[*]}"
