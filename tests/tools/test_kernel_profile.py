"""The profile counts what is run: products with their work, and kernels by kind."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention

from tools import kernel_profile
from tools.kernel_profile import Call, Kernel, Product, kind_of, product_of, profile_step, thin_shares

KERNELS = {
    "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NTN": "large products",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64>": "large products",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6_128x128x128": "attention",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": (
        "optimizer, gradient sums and norms"
    ),
    "Memcpy HtoD (Pinned -> Device)": "copies and casts",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>": "copies and casts",
    "triton_poi_fused__to_copy_12": "copies and casts",
    "triton_poi_fused__to_copy_t_view_3": "copies and casts",
    "triton_red_fused__to_copy_add_mul_native_layer_norm_4": "elementwise and norms",
    "_factor_gradients": "thin products (adapters, modulation)",
    "_write_out": "elementwise and norms",
    "triton_poi_fused__scaled_dot_product_flash_attention_backward_mul_7": "elementwise and norms",
    "void at::native::vectorized_elementwise_kernel<4, AddFunctor>": "elementwise and norms",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "exchange between GPUs",
    "_gated_norm_backward": "elementwise and norms",
    "_copy_all": "copies and casts",
    "something_new": "other",
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernels_name_tells_its_kind(name):
    assert kind_of(name) == KERNELS[name]


@pytest.mark.parametrize(
    ("operator", "shapes", "expected"),
    [
        ("aten::mm", [(4096, 2048), (2048, 16)], ("product", (4096, 16, 2048), 2 * 4096 * 16 * 2048)),
        ("aten::addmm", [(4096, 8), (4096, 16), (16, 8)], ("product", (4096, 8, 16), 2 * 4096 * 16 * 8)),
        ("aten::addmm", [(8,), (4096, 16), (16, 8)], ("product", (4096, 8, 16), 2 * 4096 * 16 * 8)),
        ("aten::bmm", [(3, 5, 7), (3, 7, 11)], ("product", (15, 11, 7), 2 * 3 * 5 * 7 * 11)),
        ("aten::_flash_attention_forward", [(2, 9, 4, 8), (2, 5, 4, 8), (2, 5, 4, 8)],
         ("attention", (8, 9, 5, 8), 4 * 8 * 9 * 5 * 8)),
        ("aten::_scaled_dot_product_cudnn_attention_backward", [(2, 4, 9, 8), (2, 4, 9, 8), (2, 4, 5, 8), (2, 4, 5, 8)],
         ("attention backward", (8, 9, 5, 8), 10 * 8 * 9 * 5 * 8)),
    ],
)  # fmt: skip
def test_what_an_operator_computes_follows_from_its_shapes(operator, shapes, expected):
    assert product_of(operator, shapes)[:3] == expected


@pytest.mark.parametrize("operator", ["aten::mul", "aten::scaled_dot_product_attention", "aten::native_layer_norm"])
def test_other_operators_are_no_products(operator):
    assert product_of(operator, [(2, 3, 4, 5)] * 3) is None


def test_a_kernel_that_serves_thin_and_large_products_is_shared_between_them():
    thin, large = (Product("product", (4096, 2048, side), 0.0, 0.0) for side in (16, 2048))
    calls = [
        Call(thin, (Kernel("a", 1.0), Kernel("reduce", 1.0))),
        Call(large, (Kernel("a", 3.0),)),
        Call(large, (Kernel("b", 5.0),)),
    ]
    assert thin_shares(calls) == {"a": 0.25, "reduce": 1.0, "b": 0.0}


def event(name, device_type, microseconds, shapes=(), kernels=()):
    return SimpleNamespace(
        name=name,
        device_type=device_type,
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
        input_shapes=list(map(list, shapes)),
        kernels=[SimpleNamespace(name=name, duration=time) for name, time in kernels],
        self_cpu_time_total=1.0,
    )


class Recorder(NamedTuple):
    """Stands in for the profiler on a GPU."""

    found: list

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def events(self):
        return self.found


def test_a_recorded_step_has_its_own_kernels_and_the_shapes_of_the_plain_one(monkeypatch):
    cpu, cuda = DeviceType.CPU, DeviceType.CUDA
    replayed = [
        event("cudaGraphLaunch", cpu, 5.0),
        event("nvjet_big", cuda, 40.0),
        event("triton_poi_fused_add_1", cuda, 20.0),
        event("region", cpu, 100.0),
        event("region", cuda, 99.0),
    ]
    plain = [
        event("aten::mm", cpu, 3.0, [(4096, 2048), (2048, 2048)], [("nvjet_big", 30.0)]),
        event("aten::mm", cpu, 3.0, [(4096, 2048), (2048, 16)], [("nvjet_big", 8.0), ("splitKreduce", 2.0)]),
        event("nvjet_big", cuda, 30.0),
    ]
    recorders = iter([Recorder(replayed), Recorder(plain)])
    monkeypatch.setattr(kernel_profile, "profile", lambda **_: next(recorders))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    report = profile_step(lambda: None, lambda: None, count=1)
    assert report["busy_ms"] == 0.06 and report["kernels"] == 2
    times = {entry["kind"]: entry["ms"] for entry in report["kinds"]}
    assert times["large products"] == pytest.approx(0.04 * 30 / 38, abs=1e-3)
    assert times["thin products (adapters, modulation)"] == pytest.approx(0.04 * 8 / 38, abs=1e-3)
    assert times["elementwise and norms"] == 0.02
    assert [(entry["shape"], entry["ms"]) for entry in report["products"]] == [
        ([4096, 2048, 2048], 0.03), ([4096, 16, 2048], 0.01)
    ]  # fmt: skip


def test_each_product_of_a_step_is_found_with_its_work():
    a, b, q = torch.randn(300, 400), torch.randn(400, 500), torch.randn(1, 2, 6, 8)

    def step():
        return a @ b, (a @ b[:, :16]).relu(), scaled_dot_product_attention(q, q, q)

    report = profile_step(step, None, count=2)
    found = {(entry["kind"], tuple(entry["shape"])): entry for entry in report["products"]}
    assert set(found) == {
        ("product", (300, 500, 400)), ("product", (300, 16, 400)), ("attention", (2, 6, 6, 8))
    }  # fmt: skip
    large = found["product", (300, 500, 400)]
    assert large["calls"] == 1 and large["teraflop"] == pytest.approx(2 * 300 * 500 * 400 / 1e12)
    kinds = {entry["kind"]: entry for entry in report["kinds"]}
    assert {"large products", "thin products (adapters, modulation)", "attention"} <= set(kinds)
    assert sum(entry["share"] for entry in kinds.values()) == pytest.approx(1, abs=0.01)
    assert sum(entry["ms"] for entry in kinds.values()) == pytest.approx(report["busy_ms"], abs=0.01)
