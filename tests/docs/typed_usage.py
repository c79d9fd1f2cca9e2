"""Every public name used as a user's program does; mypy --strict reads this, nothing runs it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from flamingo_kernels import FlamingoConfig, FlamingoModel, __version__
from flamingo_kernels.convert import (
    Conversion,
    convert_open_flamingo,
    convert_open_flamingo_file,
    load_idefics,
    load_open_flamingo,
    load_timm_nfnet,
    read_tensors,
    to_open_flamingo,
)
from flamingo_kernels.data.augment import ImagePreparation
from flamingo_kernels.data.images import load_image, stack_media, to_pixel_values
from flamingo_kernels.data.prompts import VQA, PromptTemplate, build_prompt
from flamingo_kernels.data.retrieval import pool_features, random_orders, retrieve
from flamingo_kernels.data.samples import SampleBuilder, TextEncoding
from flamingo_kernels.data.stream import BatchLoader, SampleStream
from flamingo_kernels.language import (
    BlockHook,
    ByteTokenizer,
    Decoder,
    DecoderCache,
    DecoderConfig,
    HuggingFaceCache,
    HuggingFaceLanguageConfig,
    HuggingFaceLanguageModel,
    LanguageConfig,
    LanguageModel,
    LanguageModelCache,
    LanguageModelOutput,
    MediaTokens,
    NewTokenRows,
    PlainTextEncoder,
    add_media_tokens,
    build_language_model,
    checkpoint_blocks,
    encode_prompt,
    prompt_start,
)
from flamingo_kernels.model import CrossAttentionConfig, FlamingoOutput, ResamplerConfig
from flamingo_kernels.nn import (
    FeedForward,
    GatedCrossAttentionBlock,
    LayerNorm,
    MediaKeyValue,
    PerceiverResampler,
)
from flamingo_kernels.ops import (
    KernelUnavailableError,
    KeyRanges,
    MediaSpans,
    gated_activation,
    gated_activation_linear,
    gated_residual,
    key_lengths,
    latent_attention,
    layer_norm,
    layer_norm_linear,
    media_cross_attention,
    plan_media_attention,
)
from flamingo_kernels.train import TrainConfig, Trainer, TrainingError
from flamingo_kernels.vision import (
    NFNET_VARIANTS,
    FeaturesConfig,
    HuggingFaceVisionConfig,
    HuggingFaceVisionEncoder,
    ModuleVisionConfig,
    NFNet,
    NFNetConfig,
    NFNetVariant,
    PrecomputedFeatures,
    VisionConfig,
    VisionEncoder,
    build_vision_encoder,
    read_vision_encoder,
    wrap_vision_encoder,
)


def ops(q: Tensor, k: Tensor, v: Tensor, input_ids: Tensor, gate: Tensor) -> Tensor:
    spans: MediaSpans = MediaSpans.from_tokens(input_ids, 9, attend="last", assign="previous")
    spans = plan_media_attention(spans, k, kernel="auto")
    seen: Tensor = spans.visible(k.shape[1])
    try:
        out: Tensor = media_cross_attention(q, k, v, spans, gate, scale=0.1, kernel="triton")
    except KernelUnavailableError:
        out = media_cross_attention(q, k, v, MediaSpans(spans.first, spans.last))
    ranges: KeyRanges = KeyRanges.from_items(spans, torch.tensor([[3, 5]]))
    ranges = plan_media_attention(ranges, k[:, 0], kernel="auto")
    out = out + media_cross_attention(q, k[:, 0], v[:, 0], ranges, gate)
    keys, values = k.flatten(0, 1), v.flatten(0, 1)
    latents: Tensor = latent_attention(keys, keys, values, keys, values, lengths=None)
    lengths: Tensor = key_lengths(keys[..., 0, 0] > 0)
    latents = latent_attention(keys, keys, values, keys, values, lengths)
    return out.sum() + latents.sum() + seen.sum()


def rows(x: Tensor, gate: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    y: Tensor = gated_residual(x, x, gate)
    y = gated_activation(y, gate, activation="squared_relu")
    y = y + layer_norm(x, weight, None, eps=1e-5)
    z: Tensor = layer_norm_linear(y, weight, weight, projection)
    return gated_activation_linear(z, projection, gate, kernel="torch")


class Layer(nn.Module):
    """A layer of a user's own on the package's modules."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = LayerNorm(32)
        self.resampler = PerceiverResampler(24, depth=2, num_latents=8, max_num_frames=8)
        self.block = GatedCrossAttentionBlock(32, 24, attend="previous", kernel="auto")
        self.ff = FeedForward(32, activation="gelu")

    def forward(self, x: Tensor, features: Tensor, spans: MediaSpans) -> Tensor:
        latents: Tensor = self.resampler(features, num_frames=None)
        media_kv: MediaKeyValue = self.block.project_media(latents)
        x = self.block(self.norm(x), spans=spans, media_kv=media_kv)
        x = x + self.ff(x)
        return x


def configure(name: str) -> FlamingoConfig:
    names: tuple[str, ...] = FlamingoConfig.names()
    vision: VisionConfig = NFNetConfig.from_variant("F0")
    language: LanguageConfig = DecoderConfig(vocab_size=99, dim=32, depth=2, heads=2, head_dim=16)
    config = FlamingoConfig(
        name=names[0],
        vision=vision,
        language=language,
        resampler=ResamplerConfig(dim=32, heads=2, head_dim=16, input_dim=vision.output_dim),
        cross_attention=CrossAttentionConfig(every=1, heads=2, head_dim=16),
        image_token_id=98,
        end_of_chunk_token_id=97,
    )
    blocks: tuple[int, ...] = config.cross_attention_blocks
    return FlamingoConfig.from_dict(config.to_dict()) if blocks else FlamingoConfig.from_name(name)


def model(input_ids: Tensor, pixel_values: Tensor, folder: Path) -> FlamingoModel:
    flamingo = FlamingoModel(FlamingoConfig.from_name("tiny"), kernel="auto")
    out: FlamingoOutput = flamingo(
        input_ids, pixel_values, labels=input_ids, num_images=torch.tensor([1]), use_cache=True
    )
    loss, logits, cache = out.loss, out.logits, out.cache
    if loss is not None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    if cache is not None:
        cache = cache.select_rows(torch.zeros(2, dtype=torch.int64))
    flamingo.gradient_checkpointing_enable({"use_reentrant": True})
    flamingo.gradient_checkpointing_disable()
    trained: dict[str, nn.Parameter] = flamingo.trainable_parameters()
    ids = flamingo.generate(input_ids, pixel_values, max_new_tokens=5, num_beams=3)
    scores: Tensor = flamingo.score_answers(input_ids, [[1], [2, 3]], pixel_values, cache=cache)
    print(__version__, logits, len(trained), ids, scores)
    flamingo.save_pretrained(folder, include_frozen=True)
    return FlamingoModel.from_pretrained(folder, "torch").train()


def backbones(vision: nn.Module, language: nn.Module, tokenizer: object) -> FlamingoModel:
    tokens: MediaTokens = add_media_tokens(tokenizer, language)
    prompt: list[int] = encode_prompt(tokenizer, "<image>")
    caption: list[int] = PlainTextEncoder(tokenizer)("<image>")
    start: tuple[int, ...] = prompt_start(tokenizer)
    assert prompt[: len(start)] == list(start) and prompt[-1] not in caption
    flamingo = FlamingoModel.from_backbones(wrap_vision_encoder(vision), language)
    FlamingoModel.from_backbones(read_vision_encoder("folder"), language)
    _, unwrapped = flamingo.unwrap()
    rows: NewTokenRows | None = flamingo.new_tokens
    print(tokens.image_token_id, rows)
    return FlamingoModel.from_backbones(768, unwrapped)


def language_models(config: DecoderConfig, given: nn.Module, ids: Tensor) -> Tensor | None:
    built: nn.Module = build_language_model(config)
    wrapped = HuggingFaceLanguageModel(given)
    of_config: HuggingFaceLanguageConfig = wrapped.config
    decoder: LanguageModel = Decoder(config)
    hook: BlockHook = lambda i, hidden: hidden  # noqa: E731
    checkpoint_blocks(decoder.blocks, use_reentrant=False)
    out: LanguageModelOutput = decoder(ids, before_block=hook, use_cache=True)
    cache: LanguageModelCache | None = out.cache
    if isinstance(cache, (DecoderCache, HuggingFaceCache)):
        cache = cache.index_select(torch.tensor([0]))
    text: str = ByteTokenizer().decode(ByteTokenizer().encode("text"))
    print(built, of_config, text)
    return out.logits


def vision_encoders(given: nn.Module, encoder: VisionEncoder, images: Tensor) -> Tensor:
    variant: NFNetVariant = NFNET_VARIANTS["F0"]
    configs: tuple[VisionConfig, ...] = (
        NFNetConfig.from_variant("F0"),
        FeaturesConfig(output_dim=16),
        ModuleVisionConfig(output_dim=16, image_size=224),
        HuggingFaceVisionConfig(
            model_type="clip", image_size=16, output_dim=16, drop_class_token=True
        ),
    )
    built: list[nn.Module] = [build_vision_encoder(config) for config in configs]
    nfnet = NFNet(NFNetConfig.from_variant("F0", stochastic_depth=0.1))
    wrapped = HuggingFaceVisionEncoder(given, drop_class_token=True)
    print(variant.depths, built, wrapped.config, PrecomputedFeatures(16))
    features: Tensor = encoder(images)
    for encoder in (nfnet, wrapped):
        features = encoder(images)
    return features


def conversion(path: Path, vision: nn.Module, language: nn.Module) -> FlamingoModel:
    tensors: dict[str, Tensor] = read_tensors(path)
    flamingo: FlamingoModel = load_open_flamingo(tensors, vision, language, image_token_id=5)
    state: dict[str, Tensor] = to_open_flamingo(flamingo)
    converted: Conversion = convert_open_flamingo(state, flamingo.config, language)
    converted = convert_open_flamingo_file(path, path.parent)
    encoder: NFNet = load_timm_nfnet(path, NFNetConfig.from_variant("F6"))
    print(converted.report, encoder)
    return load_idefics(path, kernel="auto")


def data(path: Path, features: Tensor) -> tuple[str, dict[str, Tensor]]:
    pixels: Tensor = to_pixel_values(load_image(path), 224, fit="crop")
    batch: dict[str, Tensor] = stack_media([[pixels], []])
    template: PromptTemplate = VQA
    prompt: str = build_prompt(template, [], {"question": "What?"})
    vectors: Tensor = pool_features(features)
    print(retrieve(vectors, vectors, shots=4), random_orders(4, 6))
    return prompt, batch


def train(path: Path, flamingo: FlamingoModel) -> int:
    config = TrainConfig.from_yaml(path)
    tokens = ByteTokenizer()
    encoding = TextEncoding(tokens.encode, tokens.image_token_id, tokens.end_of_chunk_token_id)
    build = SampleBuilder("pairs", encoding, ImagePreparation(32))
    loader = BatchLoader(
        lambda part, parts: SampleStream(["a.tar"], build, part=part, parts=parts), 2, 0
    )
    trainer = Trainer(flamingo, {"pairs": loader}, config)
    try:
        if not trainer.resume():
            trainer.run()
        saved: Path = trainer.save()
    except TrainingError as error:
        raise SystemExit(str(error)) from None
    print(saved, trainer.skipped())
    return trainer.step_number
