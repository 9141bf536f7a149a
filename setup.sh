#!/bin/sh
# Called by make where tinygrad found no device: without a GPU it needs clang. Installs it where that works without asking.
py=$1
as_root=
[ "$(id -u)" = 0 ] || as_root="sudo -n"
if ! "$py" -c 'import unet, shutil, sys; sys.exit(unet.clang() is not None)'; then
  "$py" -c 'import sys, unet
try: unet.device()
except RuntimeError as e: sys.exit(str(e))'
  exit
fi
echo "tinygrad runs on the CPU here and needs clang: trying to install it" >&2
case $(uname -s) in
  Darwin) echo "clang is missing: type 'xcode-select --install', then run make again" >&2; exit 1 ;;
esac
try() { $as_root env DEBIAN_FRONTEND=noninteractive "$@" >/dev/null 2>&1; }
if command -v apt-get >/dev/null; then
  try apt-get update -qq
  # the newer ones know more processors and compile faster
  try apt-get install -y -qq --no-install-recommends clang-19 || try apt-get install -y -qq --no-install-recommends clang-18 || try apt-get install -y -qq --no-install-recommends clang
elif command -v dnf >/dev/null; then try dnf install -y -q clang
elif command -v pacman >/dev/null; then try pacman -Sy --noconfirm clang
elif command -v apk >/dev/null; then try apk add -q clang
elif command -v zypper >/dev/null; then try zypper -n install clang
fi
"$py" -c 'import sys, unet
try: unet.device()
except RuntimeError as e: sys.exit(str(e))'
