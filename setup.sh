#!/bin/sh
# Called by make before a program runs: gets clang where tinygrad needs it and that works without asking.
py=$1
check() {  # says what is wrong: 1 what clang would not mend, 2 no clang and no other device
  PLAIN=1 "$py" -c 'if True:
    import contextlib, io, os, sys
    from engine.device import find_compiler, open_device
    asked = os.environ.get("DEV") or "CPU"
    try:
      with contextlib.redirect_stderr(io.StringIO()): open_device()
    except (RuntimeError, ValueError, OSError) as e:
      print(e)
      sys.exit(2 if asked.upper().startswith("CPU") and type(e) is RuntimeError and not find_compiler() else 1)'
}
end() {
  [ -z "$message" ] || echo "$message" >&2
  exit $status
}
message=$(check); status=$?
if [ $status -ne 2 ] || [ "$(uname -s)" = Darwin ]; then end; fi

as_root=
[ "$(id -u)" = 0 ] || as_root="sudo -n"
quietly() { $as_root env DEBIAN_FRONTEND=noninteractive "$@" >/dev/null 2>&1; }
echo "tinygrad runs on the CPU here and needs clang, preferably version 18 or newer: trying to install it" >&2
if command -v apt-get >/dev/null; then
  quietly apt-get update -qq
  for clang in clang-19 clang-18 clang; do quietly apt-get install -y -qq --no-install-recommends $clang && break; done
  # tinygrad by itself, without a program of this project that looks for it, knows no other name than clang
  command -v clang >/dev/null || quietly update-alternatives --install /usr/bin/clang clang "$(command -v $clang)" 1
elif command -v dnf >/dev/null; then quietly dnf install -y -q clang
elif command -v pacman >/dev/null; then quietly pacman -S --noconfirm clang
elif command -v apk >/dev/null; then quietly apk add -q clang
elif command -v zypper >/dev/null; then quietly zypper -n install clang
fi
message=$(check); status=$?
end
