#!/usr/bin/env bash
# Usage: wheel_check.sh TORCH_VERSION...   Builds an sdist, a wheel from that sdist (build isolation on, no torch in
# sight), and runs the op tests on that one wheel under each torch version, in environments under build/wheel-check.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD/build/wheel-check
rm -rf "$root/dist" "$root/source" && mkdir -p "$root/dist"
test -x "$root/build/bin/python" || "$PYTHON" -m venv "$root/build"
"$root/build/bin/pip" install -q build
"$root/build/bin/python" -c 'import importlib.util as u; assert u.find_spec("torch") is None'
"$root/build/bin/python" -m build -q --sdist --outdir "$root/dist" .
mkdir "$root/source" && tar -xzf "$root"/dist/*.tar.gz -C "$root/source" --strip-components 1
test -d "$root/source/csrc" && test -d "$root/source/kernels"
"$root/build/bin/pip" wheel -q --no-deps -w "$root/dist" "$root"/dist/*.tar.gz
wheel=$(ls "$root"/dist/*.whl)
for version in "$@"; do
  env="$root/torch-$version"
  test -x "$env/bin/python" || "$PYTHON" -m venv "$env"
  "$env/bin/pip" install -q "torch==$version" numpy pytest hypothesis
  "$env/bin/pip" install -q --force-reinstall --no-deps "$wheel"
  echo "== $(basename "$wheel") under torch $("$env/bin/python" -c 'import torch; print(torch.__version__)')"
  SSLFAST_EXPECT_IN="$env" "$env/bin/pytest" -k "not compile" tests/test_similarity_lse*.py tests/test_contrastive.py
done
