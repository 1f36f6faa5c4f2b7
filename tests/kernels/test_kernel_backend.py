"""Which implementation is active, and what is said about it. Each case needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sgl_kernels
from sgl_kernels import backend, collect_env

ROOT = Path(sgl_kernels.__file__).parent.parent

needs_triton = pytest.mark.skipif(not backend._triton_is_installed(), reason="triton is not installed")

WORKS = """
import torch, sgl_kernels
token, logprob = sgl_kernels.greedy_token(torch.tensor([[0.0, 2.0, 1.0]]))
assert token.tolist() == [1], token
q, k = torch.randn(1, 4, 8), torch.randn(1, 2, 9, 8)
sgl_kernels.decode_attention(q, k, k, torch.tensor([9], dtype=torch.int32))
print(sgl_kernels.collect_env()["backends"]["decode_attention"])
"""


def refusing(*names):
    """Code after which none of these modules can be imported."""
    return f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {names}:
            raise ImportError("undefined symbol: made_up_for_the_test")

sys.meta_path.insert(0, Refuse())
"""


BROKEN = refusing("sgl_kernels._C")
# A CUDA build of torch as far as the choice of a backend looks at it; no CUDA tensor can be made.
CUDA_BUILD = "import torch; torch.version.cuda = '13.0'\n" + refusing("sgl_kernels._C_cuda")
SHOW = """
import sys, sgl_kernels
env = sgl_kernels.collect_env()
print(*sorted(set(env["backends"].values())), *(sorted(set(d.values())) for d in env["devices"].values()))
assert "triton" not in sys.modules
"""


def python(code, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SGL_KERNELS_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_forced_reference_says_so_once():
    result = python(WORKS, SGL_KERNELS_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "reference"
    lines = [line for line in result.stderr.splitlines() if "SLOW PATH" in line]
    assert len(lines) == 1
    assert "SGL_KERNELS_BACKEND=reference" in lines[0]


def test_broken_extension_falls_back_and_keeps_the_reason():
    code = BROKEN + WORKS + "print(sgl_kernels.collect_env()['load_errors'])"
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("reference\n")
    assert "made_up_for_the_test" in result.stdout
    assert result.stderr.count("SLOW PATH") == 1
    assert "made_up_for_the_test" in result.stderr


def test_required_backend_that_does_not_load_is_an_error():
    result = python(BROKEN + "import sgl_kernels", SGL_KERNELS_BACKEND="cpu")
    assert result.returncode != 0
    assert "SGL_KERNELS_BACKEND=cpu" in result.stderr
    assert "made_up_for_the_test" in result.stderr


def test_unknown_backend_name():
    result = python("import sgl_kernels", SGL_KERNELS_BACKEND="fast")
    assert result.returncode != 0
    assert "is 'fast', expected one of reference, cpu, cuda, triton, or unset" in result.stderr


@pytest.mark.skipif(backend._torch_has_gpu(), reason="this torch is built for a GPU: Triton needs no more")
def test_triton_on_a_cpu_build_of_torch_says_what_to_do():
    result = python("import sgl_kernels", SGL_KERNELS_BACKEND="triton", TRITON_INTERPRET="0")
    assert result.returncode != 0
    assert "is built for CPUs only: install a CUDA or ROCm build" in result.stderr
    assert "or set TRITON_INTERPRET=1" in result.stderr


def test_missing_triton_says_what_to_do():
    code = refusing("triton") + "import sgl_kernels"
    result = python(code, SGL_KERNELS_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.returncode != 0
    assert "triton is not installed: pip install triton" in result.stderr


@needs_triton
def test_interpreted_triton_serves_the_cpu_and_is_imported_by_the_first_call():
    code = f"""
{SHOW}
from sgl_kernels import registry
assert all(registry.has_kernel(op, key) for op in registry.SCHEMAS for key in ("CPU", "CUDA"))
assert env["extensions"] == {{}}
{WORKS}
assert "triton" in sys.modules
"""
    result = python(code, SGL_KERNELS_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["triton ['triton']", "triton"]
    assert result.stderr == ""


@needs_triton
@pytest.mark.parametrize("override", ["", "triton"])
def test_without_cuda_code_triton_serves_the_gpu(compiled, override):
    result = python(CUDA_BUILD + SHOW, SGL_KERNELS_BACKEND=override)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "cpu, triton ['cpu'] ['triton']"
    assert result.stderr == ""


def test_a_gpu_left_to_the_reference_is_announced(compiled):
    result = python(CUDA_BUILD + refusing("triton") + SHOW)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "cpu ['cpu'] ['reference']"
    assert "SLOW PATH, ops on GPU tensors run as plain PyTorch" in result.stderr
    assert "made_up_for_the_test, and triton is not installed (pip install triton)" in result.stderr


def test_the_cpu_backend_leaves_the_gpu_alone(compiled):
    result = python(CUDA_BUILD + SHOW, SGL_KERNELS_BACKEND="cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "cpu ['cpu'] ['reference']"
    assert result.stderr == ""


def test_vector_width_from_the_environment(compiled):
    show = WORKS + "print(sgl_kernels.collect_env()['isa'])"
    result = python(show, SGL_KERNELS_ISA="baseline", SGL_KERNELS_BACKEND="cpu")
    assert result.stdout.split() == ["cpu", "baseline"]
    assert result.stderr == ""


def test_unknown_vector_width_is_said_and_the_widest_runs(compiled):
    """Refusing to load would come too late: the kernels register themselves before the module starts."""
    widest = backend.extension("_C").build_info()["isas"][-1]
    code = (
        WORKS
        + """
env = sgl_kernels.collect_env()
print(env["isa"], env["extensions"]["_C"]["isa_refused"], env["load_errors"].get("_C"))
"""
    )
    result = python(code, SGL_KERNELS_ISA="avx1024", SGL_KERNELS_BACKEND="cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["cpu", widest, "avx1024", "None"]
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert "SGL_KERNELS_ISA is 'avx1024', expected one of baseline" in lines[0]
    assert lines[0].endswith(f"running {widest}")


def test_collect_env(compiled):
    env = collect_env()
    assert env["torch"] == torch.__version__
    assert set(env["backends"]) == {
        "decode_attention",
        "prefill_mass",
        "select_tokens",
        "prune_gather",
        "greedy_token",
        "token_logprobs",
    }
    assert all("cpu" in active for active in env["backends"].values())
    assert env["isa"] in env["extensions"]["_C"]["isas"]
    assert env["extensions"]["_C"]["compiler"]
    assert "_C" not in env["load_errors"]


def test_set_isa_quotes_the_choices(compiled):
    with pytest.raises(ValueError, match=r"'mmx', expected one of: baseline"):
        backend.extension("_C").set_isa("mmx")


def test_missing_kernels_fail_in_ci_and_skip_elsewhere():
    """Otherwise CI could be green with no compiled kernel tested."""
    here = Path(__file__).parent
    one = f"{here / 'test_kernel_backend.py'}::test_set_isa_quotes_the_choices"
    code = f"import sys, pytest; sys.exit(pytest.main(['-p', 'no:cacheprovider', '-q', {one!r}]))"
    in_ci = python(code, SGL_KERNELS_BACKEND="reference", CI="true")
    assert in_ci.returncode == 1
    assert "sgl_kernels._C is not loaded" in in_ci.stdout
    elsewhere = python(code, SGL_KERNELS_BACKEND="reference", CI="")
    assert elsewhere.returncode == 0
    assert "1 skipped" in elsewhere.stdout
