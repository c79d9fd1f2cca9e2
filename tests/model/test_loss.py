"""The loss of hidden states against that of logits: values, gradients, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flamingo_kernels.model import loss as losses
from flamingo_kernels.model.loss import next_token_loss, next_token_loss_of_hidden
from flamingo_kernels.saved_tensors import saved_bytes
from testing.backbones import LANGUAGE_OPTIONS, VOCAB, language_model
from testing.budgets import assert_close_to_reference, assert_within_budget
from testing.tiny_model import make_model, ragged_batch

B, T, DIM, CLASSES = 3, 33, 16, 211


@pytest.fixture(params=["chunks", "at once"])
def either_way(request, monkeypatch) -> None:
    """With and without torch's operator, where this torch has it."""
    if request.param == "at once":
        monkeypatch.setattr(losses, "_IN_CHUNKS", False)
    elif not losses._IN_CHUNKS:
        pytest.skip("this torch has no LinearCrossEntropyOptions")


def case(bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """fp64 hidden, weight, bias and labels; ragged rows, the last one ignored as a whole."""
    labels = torch.randint(CLASSES, (B, T))
    labels[0, 20:] = labels[1, :5] = labels[2] = -100
    hidden, weight = torch.randn(B, T, DIM).double(), torch.randn(CLASSES, DIM).double()
    return hidden, weight, torch.randn(CLASSES).double() if bias else None, labels


def with_gradient(loss, hidden: Tensor) -> tuple[Tensor, Tensor]:
    hidden = hidden.clone().requires_grad_()
    value = loss(hidden)
    (gradient,) = torch.autograd.grad(value, hidden)
    return value.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_loss_of_the_logits(dtype, bias, either_way) -> None:
    hidden, weight, shift, labels = case(bias)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    shift = None if shift is None else shift.to(dtype)
    actual = with_gradient(lambda h: next_token_loss_of_hidden(h, weight, shift, labels), hidden)
    plain = with_gradient(lambda h: next_token_loss(F.linear(h, weight, shift), labels), hidden)
    wide = None if shift is None else shift.double()
    exact = with_gradient(
        lambda h: next_token_loss(F.linear(h, weight.double(), wide), labels), hidden.double()
    )
    assert actual[0].dtype == plain[0].dtype and actual[1].dtype == dtype
    for number, what in enumerate(("loss", "gradient")):
        assert_within_budget(
            actual[number], plain[number], exact[number], dtype, gradient=what == "gradient"
        )


def test_nothing_to_predict(either_way) -> None:
    hidden, weight, bias, labels = case()
    for length in (1, T):
        value, gradient = with_gradient(
            lambda h: next_token_loss_of_hidden(h, weight, bias, labels[2:, : h.shape[1]]),
            hidden[2:, :length],
        )
        assert value == 0 and torch.equal(gradient, torch.zeros(1, length, DIM).double())


def test_ignored_positions_are_not_read(either_way) -> None:
    """Rows and ends whose labels are ignored may hold NaN; finite ones get no gradient at all."""
    hidden, weight, bias, labels = case()
    clean = next_token_loss_of_hidden(hidden, weight, bias, labels)
    hidden[2] = hidden[:, -1] = float("nan")
    assert torch.equal(next_token_loss_of_hidden(hidden, weight, bias, labels), clean)


def test_a_trained_product_gets_its_gradient() -> None:
    hidden, weight, bias, labels = case()
    gradients = []
    for loss in (
        lambda w: next_token_loss_of_hidden(hidden, w, bias, labels),
        lambda w: next_token_loss(F.linear(hidden, w, bias), labels),
    ):
        trained = weight.clone().requires_grad_()
        gradients += torch.autograd.grad(loss(trained), trained)
    assert torch.equal(*gradients)


@pytest.mark.skipif(not losses._IN_CHUNKS, reason="this torch has no LinearCrossEntropyOptions")
def test_logits_are_not_kept() -> None:
    hidden, _, _, labels = case()
    head = nn.Linear(DIM, CLASSES, bias=False).double().requires_grad_(False)
    hidden.requires_grad_()
    kept = saved_bytes(
        lambda: next_token_loss_of_hidden(hidden, head.weight, None, labels), head.parameters()
    )
    logits = B * T * CLASSES * 8
    whole = saved_bytes(lambda: next_token_loss(head(hidden), labels), head.parameters())
    assert kept < logits / 2 < whole


def test_a_model_without_logits_has_the_same_loss_and_gradients() -> None:
    model = make_model().double()
    arguments = ragged_batch().arguments()
    arguments["pixel_values"] = arguments["pixel_values"].double()
    outputs = [
        model(**arguments, labels=arguments["input_ids"], return_logits=wanted)
        for wanted in (True, False)
    ]
    assert outputs[0].logits is not None and outputs[1].logits is None
    parameters = list(model.trainable_parameters().values())
    expected, actual = (torch.autograd.grad(out.loss, parameters) for out in outputs)
    assert_close_to_reference(outputs[1].loss, outputs[0].loss, torch.float64)
    terms = max(gradient.abs().max().item() for gradient in expected)
    for one, other in zip(actual, expected, strict=True):
        assert_close_to_reference(one, other, torch.float64, terms=terms)
    with pytest.raises(ValueError, match="return_logits=False without labels"):
        model(**arguments, return_logits=False)


@pytest.mark.parametrize("model_type", LANGUAGE_OPTIONS)
def test_transformers_models_hand_over_what_their_logits_are_made_of(model_type: str) -> None:
    pytest.importorskip("transformers")
    from flamingo_kernels.language import HuggingFaceLanguageModel

    wrapped = HuggingFaceLanguageModel(language_model(model_type))
    ids = torch.randint(3, VOCAB - 2, (2, 7))
    expected = wrapped(ids).logits
    out = wrapped(ids, head=F.linear)
    assert out.logits is None and torch.equal(out.head_output, expected)
    cached = wrapped(ids, head=F.linear, use_cache=True)
    assert cached.head_output is None and torch.equal(cached.logits, expected)
    assert torch.equal(wrapped.unwrap()(ids).logits, expected)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0, "sliding_window": 6}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 7.0}),
    ],
)
def test_logits_that_are_changed_afterwards_are_given(model_type, changes, monkeypatch) -> None:
    pytest.importorskip("transformers")
    from flamingo_kernels.language import HuggingFaceLanguageModel

    monkeypatch.setitem(LANGUAGE_OPTIONS, model_type, LANGUAGE_OPTIONS["llama"])
    wrapped = HuggingFaceLanguageModel(language_model(model_type, **changes))
    ids = torch.randint(3, VOCAB - 2, (2, 7))
    expected = wrapped(ids).logits
    for _ in range(2):
        out = wrapped(ids, head=F.linear)
        assert out.head_output is None and torch.equal(out.logits, expected)


class Scaled(nn.Module):
    """Five times what it holds, of which it shows the weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.weight, self.bias = linear, linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return 5 * self.linear(x)


class Fivefold(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 5 * weight


def _replace_forward(model: nn.Module, head: nn.Module) -> None:
    own = head.forward
    head.forward = lambda x: 5 * own(x)


def _subclass(model: nn.Module, head: nn.Module) -> None:
    head.__class__ = type("Fine", (nn.Linear,), {"forward": lambda s, x: 5 * F.linear(x, s.weight)})


def _adapt(model: nn.Module, head: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    peft.inject_adapter_in_model(options, model)


def _keep_a_copy(model: nn.Module, head: nn.Module) -> None:
    peft = pytest.importorskip("peft")
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(model, options)
    model.lm_head.modules_to_save["default"].weight.data *= 5


def _offload(model: nn.Module, head: nn.Module) -> None:
    pytest.importorskip("accelerate").cpu_offload(head, execution_device="cpu")
    assert head.weight.is_meta


def _quantise(model: nn.Module, head: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(head, quantization.Int8WeightOnlyConfig())
    assert type(head.weight) is not nn.Parameter


HEADS = {
    "forward hook": lambda m, head: head.register_forward_hook(lambda h, x, out: 5 * out),
    "forward pre-hook": lambda m, head: head.register_forward_pre_hook(lambda h, x: (5 * x[0],)),
    "backward hook": lambda m, head: head.register_full_backward_hook(lambda h, x, out: None),
    "forward replaced": _replace_forward,
    "subclass": _subclass,
    "parametrization": lambda m, head: parametrize.register_parametrization(
        head, "weight", Fivefold()
    ),
    "another module": lambda m, head: setattr(m, "lm_head", Scaled(head)),
    "another linear": lambda m, head: m.set_output_embeddings(nn.Linear(32, VOCAB)),
    "LoRA": _adapt,
    "modules_to_save": _keep_a_copy,
    "offloaded": _offload,
    "int8": _quantise,
}


@pytest.mark.parametrize("after", [False, True], ids=["before wrapping", "after"])
@pytest.mark.parametrize("change", HEADS.values(), ids=list(HEADS))
def test_an_output_product_that_is_not_plain_is_called(change, after: bool) -> None:
    pytest.importorskip("transformers")
    from flamingo_kernels.language import HuggingFaceLanguageModel

    model, ids = language_model("llama"), torch.randint(3, VOCAB - 2, (2, 7))
    plain = model(ids).logits
    if not after:
        change(model, model.lm_head)
    wrapped = HuggingFaceLanguageModel(model)
    if after:
        assert torch.equal(wrapped(ids, head=F.linear).head_output, plain)
        change(model, model.lm_head)
    expected = model(input_ids=ids).logits
    out = wrapped(ids, head=F.linear)
    if out.logits is None:  # another plain linear is hooked in its turn
        assert change is HEADS["another linear"]
    assert torch.equal(out.head_output if out.logits is None else out.logits, expected)


def test_hooks_on_all_modules_are_run() -> None:
    pytest.importorskip("transformers")
    from flamingo_kernels.language import HuggingFaceLanguageModel

    wrapped, ids = HuggingFaceLanguageModel(language_model("llama")), torch.tensor([[5, 6, 7]])
    shapes = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, x, out: shapes.append(out.shape) if isinstance(module, nn.Linear) else None
    )
    try:
        assert wrapped(ids, head=F.linear).head_output is None
    finally:
        hook.remove()
    assert (1, 3, VOCAB) in shapes
    assert wrapped(ids, head=F.linear).logits is None  # the hook has gone


def test_logits_that_are_written_to_afterwards_are_given() -> None:
    pytest.importorskip("transformers")
    from flamingo_kernels.language import HuggingFaceLanguageModel

    def write(module: nn.Module, inputs: tuple, out: Any) -> None:
        out.logits[..., 3] = -1.0

    model = language_model("llama")
    model.register_forward_hook(write)
    wrapped, ids = HuggingFaceLanguageModel(model), torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        out = wrapped(ids, head=F.linear)
    assert out.head_output is None and (out.logits[..., 3] == -1).all()
