#!/usr/bin/env bash
# An environment with Avalanche beside hatcl, for the rows of field.py that it has:
#     bash benchmarks/field_env.sh FOLDER
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
python3 -m venv "${1:?usage: field_env.sh FOLDER}"
"$1/bin/pip" install -q -e "$here" timm avalanche-lib
"$1/bin/python" -c "import avalanche, hatcl; print('avalanche', avalanche.__version__, 'hatcl', hatcl.__version__)"
