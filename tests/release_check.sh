#!/usr/bin/env bash
# Usage: release_check.sh TORCH_VERSION...   Builds an sdist and from it, without torch in sight, a wheel for each Python
# from 3.10 on that is on the path. Each is installed into an empty environment and tried: the first Python under every
# torch version with the op tests too, the others under the first one. Environments are under build/release-check.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/build/release-check
rm -rf "$root/dist" "$root/source" && mkdir -p "$root/dist"
first=$("$PYTHON" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
pythons=("$PYTHON")
for name in python3.10 python3.11 python3.12 python3.13 python3.14; do
  if [ "$name" != "$first" ] && command -v "$name" > /dev/null; then pythons+=("$name"); fi
done
echo "== ${#pythons[@]} Python(s): ${pythons[*]} ($first)"

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

try() { # python, torch version, extra packages and what they run
  local python=$1 version=$2 env wheel
  env="$root/$(basename "$python")-torch-$version"
  test -x "$env/bin/python" || "$python" -m venv "$env"
  local tag
  tag=$("$env/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  ls "$root"/dist/*-"$tag"-*.whl > /dev/null 2>&1 || "$env/bin/pip" wheel -q --no-deps -w "$root/dist" "$sdist"
  wheel=$(ls "$root"/dist/*-"$tag"-*.whl)
  has "$wheel" 'dist-info/licenses/LICENSE$'
  "$env/bin/pip" install -q "torch==$version" numpy
  "$env/bin/pip" install -q --force-reinstall --no-deps "$wheel"
  echo "== $(basename "$wheel") under torch $("$env/bin/python" -c 'import torch; print(torch.__version__)')"
  (cd "$env" && bin/python "$OLDPWD/tests/smoke.py" "$env" && bin/sslfast doctor > /dev/null)
}

for version in "$@"; do
  try "$PYTHON" "$version"
  env="$root/$(basename "$PYTHON")-torch-$version"
  "$env/bin/pip" install -q pytest hypothesis
  SSLFAST_EXPECT_IN="$env" "$env/bin/pytest" -k "not compile" tests/test_similarity_lse*.py tests/test_contrastive.py
done
for python in "${pythons[@]:1}"; do try "$python" "$1"; done
