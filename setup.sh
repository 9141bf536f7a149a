#!/bin/sh
# Called by make where tinygrad found no device, or only the CPU with an old compiler: gets clang where that works without asking.
py=$1
check() {
  "$py" -c 'import sys, unet
try: cpu = unet.device().startswith("CPU")
except RuntimeError as e: sys.exit(str(e))
if cpu and unet.outdated_clang():
  print("clang here is older than 18 and does not know this processor: everything works, but takes three times as long", file=sys.stderr)'
}
# a device that is wrong for another reason than the compiler
"$py" -c 'import sys, unet; sys.exit(unet.clang() is not None and not unet.outdated_clang())' || { check; exit; }
if [ "$(uname -s)" = Darwin ]; then check; exit; fi

as_root=
[ "$(id -u)" = 0 ] || as_root="sudo -n"
quietly() { $as_root env DEBIAN_FRONTEND=noninteractive "$@" >/dev/null 2>&1; }
echo "tinygrad runs on the CPU here and needs clang, best 18 or newer: trying to install it" >&2
if command -v apt-get >/dev/null; then
  quietly apt-get update -qq
  for clang in clang-19 clang-18 clang; do quietly apt-get install -y -qq --no-install-recommends $clang && break; done
elif command -v dnf >/dev/null; then quietly dnf install -y -q clang
elif command -v pacman >/dev/null; then quietly pacman -S --noconfirm clang
elif command -v apk >/dev/null; then quietly apk add -q clang
elif command -v zypper >/dev/null; then quietly zypper -n install clang
fi
check
