#!/usr/bin/env bash
# Usage: release_check.sh TORCH_VERSION...   Builds an sdist and from it, without torch in sight, a wheel for each Python
# from 3.10 on that is on the path or among pyenv's. Each is installed into an empty environment and tried: $PYTHON's
# under every torch version with the op tests too, with the extras under the first one, the others under that alone.
# All of it is under build/release-check; environments that were fine are removed, since some take gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/build/release-check
rm -rf "$root/dist" "$root/source" && mkdir -p "$root/dist"
version_of() { # a Python that can make environments and has its headers
  "$1" -c 'import ensurepip, pathlib, sys, sysconfig
assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()
print("%d.%d" % sys.version_info[:2])' 2> /dev/null
}
pythons=("$PYTHON") seen=" $(version_of "$PYTHON") "
for python in python3.1{0..4} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3.1[0-4]; do
  version=$(version_of "$python") || continue
  if [[ $seen != *" $version "* ]]; then pythons+=("$python") seen+="$version "; fi
done
echo "== ${#pythons[@]} Python(s): $seen"

has() { # archive, pattern
  "$root/build/bin/python" - "$1" "$2" << 'END'
import re, sys, tarfile, zipfile
path, pattern = sys.argv[1:]
names = zipfile.ZipFile(path).namelist() if path.endswith(".whl") else tarfile.open(path).getnames()
assert any(re.search(pattern, name) for name in names), f"{path} has no {pattern}"
END
}

test -x "$root/build/bin/python" || "$PYTHON" -m venv "$root/build"
"$root/build/bin/pip" install -q build
"$root/build/bin/python" -c 'import importlib.util as u; assert u.find_spec("torch") is None'
"$root/build/bin/python" -m build -q --sdist --outdir "$root/dist" .
sdist=$(ls "$root"/dist/*.tar.gz)
for part in LICENSE README.md csrc/CMakeLists.txt kernels/tuning.py sslfast/bench/run.py; do has "$sdist" "/$part\$"; done

try() { # python, torch version, "all" for the op tests, or "extras" for these as well
  local python=$1 version=$2 more=${3:-} env wheel tag
  env="$root/$(basename "$python")-torch-$version"
  "$python" -m venv --clear "$env"
  tag=$("$env/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  ls "$root"/dist/*-"$tag"-*.whl > /dev/null 2>&1 || "$env/bin/pip" wheel -q --no-deps -w "$root/dist" "$sdist"
  wheel=$(ls "$root"/dist/*-"$tag"-*.whl)
  has "$wheel" 'dist-info/licenses/LICENSE$'
  "$env/bin/pip" install -q "$wheel" "torch==$version"
  echo "== $(basename "$wheel") under torch $("$env/bin/python" -c 'import torch; print(torch.__version__)')"
  (cd "$env" && bin/python "$OLDPWD/tests/smoke.py" "$env" && bin/sslfast doctor > /dev/null)
  if [ -n "$more" ]; then
    "$env/bin/pip" install -q pytest hypothesis
    SSLFAST_EXPECT_IN="$env" "$env/bin/pytest" -k "not compile" tests/test_similarity_lse*.py tests/test_contrastive.py
  fi
  if [ "$more" = extras ]; then
    "$env/bin/pip" install -q "$wheel[bench]"
    (cd "$env" && bin/sslfast bench clip_loss --sizes 64 --seconds 0.05)
    "$env/bin/pip" install -q "$wheel[train]"
    (cd "$env" && bin/sslfast train simclr --data mnist5k --out run --epochs 1 && bin/sslfast report run)
  fi
  rm -r "$env"
}

try "$PYTHON" "$1" extras
for version in "${@:2}"; do try "$PYTHON" "$version" all; done
for python in "${pythons[@]:1}"; do try "$python" "$1"; done
echo "== all well"
