#!/usr/bin/env sh
# Prints the Python that `make` uses: the newest of the versions that this project is tested on and
# that works when it is run. It looks on the PATH, in pyenv's folder and among uv's Pythons. Without
# one it prints Python 3.11, with a line on stderr; without that it ends with code 2.
#
#   find_python.sh           what `make` uses
#   find_python.sh newest    the newest of the tested versions, or code 2
#   find_python.sh oldest    Python 3.11, or code 2
set -u

TESTED="3.13 3.12"
OLDEST="3.11"

# A shim of pyenv is on the PATH but fails when it is run, so every candidate is run. `ensurepip` is
# what `python -m venv` needs; Debian packages it apart.
works() {
  "$1" -c "import ensurepip, sys; sys.exit('%d.%d' % sys.version_info[:2] != '$2')" >/dev/null 2>&1
}

candidates() {
  command -v "python$1"
  command -v python3
  for python in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/"$1".*/bin/python"$1"; do
    [ -x "$python" ] && echo "$python"
  done
  if command -v uv >/dev/null 2>&1; then
    uv python find --offline "$1" 2>/dev/null
  fi
}

case "${1:-}" in
  newest) versions=${TESTED%% *} ;;
  oldest) versions=$OLDEST ;;
  *) versions="$TESTED $OLDEST" ;;
esac

for version in $versions; do
  for python in $(candidates "$version"); do
    if works "$python" "$version"; then
      if [ "$version" = "$OLDEST" ] && [ "$versions" != "$OLDEST" ]; then
        echo "bn_jax: no Python of $TESTED was found; Python $OLDEST stays on jax 0.10" >&2
      fi
      echo "$python"
      exit 0
    fi
  done
done

if [ $# = 0 ]; then
  echo "bn_jax: no Python $TESTED or $OLDEST was found; install one, or set PYTHON=" >&2
else
  echo "bn_jax: no Python $versions was found" >&2
fi
exit 2
