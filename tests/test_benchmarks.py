"""What the scripts of `benchmarks/` read off programs and profiles, as far as no GPU is needed."""

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)


PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %permute = bf16[4,8]{1,0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  %moved = bf16[4,8]{1,0} copy(%permute), backend_config={"estimated_cycles":"5"}
}

%condition (p: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[] constant(3)
}

%called (p: bf16[4,8]) -> bf16[4,8] {
  ROOT %all = f32[16]{0} all-gather(%y), replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (p0: bf16[4,8]) -> bf16[4,8] {
  %loop = (s32[], bf16[4,8]) while(%start), condition=%condition, body=%body
  %known = (s32[], bf16[4,8]) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"7"}}
  %call = f32[16]{0} call(%p0), to_apply=%called
  %sum = (f32[10]{0}, f32[]) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add
  %over = f32[10]{0} all-reduce(%a), replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add
  %begun = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%c), \
source_target_pairs={{0,1}}
  %noted = f32[6]{0} add(%c, %c), backend_config={"estimated_cycles":"100"}
}
"""


def test_exchanges_are_read_off_a_program():
    from hlo import exchanges

    found = {(each.kind, each.times, each.sent) for each in exchanges(PROGRAM, 8)}
    assert found == {
        ("collective-permute", 3, 4 * 8 * 2),
        ("collective-permute", 7, 4 * 8 * 2),
        ("all-gather", 1, 16 * 4 * 3 / 4),  # a ring's device passes on all parts but one
        ("all-reduce", 1, (10 + 1) * 4 * 2 * 1 / 2),
        ("all-reduce", 1, 10 * 4 * 2 * 3 / 4),
        ("collective-permute", 1, 6 * 4),
    }
    halos = [e.sent for e in exchanges(PROGRAM, 8, halo_bytes=2) if e.kind == "collective-permute"]
    assert halos == [64, 64, 12]


def test_cycles_are_counted_as_often_as_loops_run():
    from cycles import cycles

    assert cycles(PROGRAM) == (3 + 7) * 5 + 100


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized>", "convolution"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "product"),
        ("input_reduce_fusion_3", "norm"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>", "norm"),
        ("triton_red_fused_convolution_native_group_norm_silu_4", "norm"),
        ("triton_poi_fused_convolution_silu_7", "other"),
        ("triton_poi_fused_cat_2", "copy"),
        ("void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16>", "copy"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::...>", "copy"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("loop_transpose_fusion_2", "copy"),
        ("loop_multiply_fusion", "other"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    from kernels import kind_of

    assert kind_of(name) == kind


def test_a_profile_has_the_operations_of_the_program():
    from kernels import by_kind, profiled_by_jax

    x = jnp.ones((256, 256))
    program = jax.jit(lambda x: jnp.sum(jnp.sort(x @ x), axis=0)).lower(x).compile()
    kernels = profiled_by_jax(lambda: program(x).block_until_ready())
    assert len(kernels) > 1
    assert all(f"{name} = " in program.as_text() for name, _ in kernels)
    total = sum(seconds for _, seconds in kernels)
    assert 0 < total == pytest.approx(sum(by_kind(kernels).values()))


def output(script, *arguments):
    command = [sys.executable, str(FOLDER / script), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_all_stages_stay_within_the_budget():
    text = output("gpu_all.py", "--dry-run", "--budget", "100")
    limits = [int(each) for each in re.findall(r"## .*, at most (\d+) s", text)]
    budgets = [int(each) for each in re.findall(r"--budget (\d+)", text)]
    assert max(limits) == 100
    assert max(budgets) < 100
    assert {"small", "large", "tests"} <= set(re.findall(r"## (\w+)", text))


@pytest.mark.parametrize("script", ["gpu.py", "gpu_all.py", "devices.py"])
def test_scripts_say_how_they_are_called(script):
    assert "usage: " in output(script, "--help")
