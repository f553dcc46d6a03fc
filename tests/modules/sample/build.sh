#!/bin/sh
# The same without CMake: build.sh FOLDER, with pkg-config finding opd-provider.
set -eu
here=$(dirname "$0")
out=$1
mkdir -p "$out"
build() {
	uuid=$(sha256sum "$here/$2" | cut -d' ' -f1)
	# shellcheck disable=SC2046 # flags are words
	${CC:-cc} -std=gnu11 -O2 -Wall -Wextra -Werror -fPIC -shared -fvisibility=hidden $(pkg-config --cflags opd-provider) -DSAMPLE_UUID="\"$uuid\"" \
		-o "$out/$1.so" "$here/$2" -lm $(pkg-config --libs opd-provider)
}
build opd-provider-sample sample.c
build opd-provider-softcap softcap.c
