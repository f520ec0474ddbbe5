# SPDX-License-Identifier: Apache-2.0
"""What random networks are made of. Each piece writes lines that fit the current value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fuzz.writer import Writer

ALL = ("2d", "1d", "tokens", "flat")
SPATIAL = ("2d", "1d")
MOST_VALUES = 9 * 6 * 6


@dataclass(frozen=True)
class Piece:
    """A way to go on from the current value.

    Args:
        write: writes it.
        layouts: of the values it takes.
        weight: how often it is drawn, relative to others.
        fits: whether it can follow now.
    """

    write: Callable[[Writer], None]
    layouts: tuple[str, ...]
    weight: int
    fits: Callable[[Writer], bool]


PIECES: list[Piece] = []


def piece(
    *layouts: str, weight: int = 1, fits: Callable[[Writer], bool] = lambda w: True
) -> Callable[[Callable[[Writer], None]], Callable[[Writer], None]]:
    """Register a piece."""

    def register(write: Callable[[Writer], None]) -> Callable[[Writer], None]:
        PIECES.append(Piece(write, layouts, weight, fits))
        return write

    return register


def add_piece(w: Writer) -> None:
    """Draw a piece that fits and write it."""
    fitting = [p for p in PIECES if w.layout in p.layouts and p.fits(w)]
    w.of(*(p for p in fitting for _ in range(p.weight))).write(w)


# Layers.


def convolution(w: Writer, out: int, plain: bool = False) -> str:
    """Code of a convolution that takes the current value, and notes on how it is special."""
    size, dims = min(w.space), len(w.space)
    kernel = w.of(1, 3)
    options = []
    if kernel == 3:
        mode = w.of("zeros", "zeros", "reflect", "circular", "replicate")
        dilation = 2 if not plain and size > 2 and w.number(0, 4) == 4 else 1
        padding = dilation if plain or size < 2 * dilation + 1 else w.of(dilation, dilation, 0)
        if mode == "reflect" and padding >= size or padding == 0:
            mode = "zeros"
        options += [f"padding={padding}", f"dilation={dilation}", f"padding_mode={mode!r}"]
    if not plain and size >= 4 and w.number(0, 3) == 3:
        options.append("stride=2")
    if w.number(0, 3) == 3:
        options.append("bias=False")
    return ", ".join([f"nn.Conv{dims}d({w.width}", str(out), str(kernel), *options]) + ")"


def layer(w: Writer, out: int, plain: bool = False) -> str:
    """Code of a layer that makes ``out`` units of the current value."""
    if w.layout in SPATIAL:
        return convolution(w, out, plain)
    return f"nn.Linear({w.width}, {out}, bias={w.number(0, 3) < 3})"


def note_options(w: Writer, name: str, code: str) -> None:
    """Count the options of a layer for the tables."""
    for option in ("reflect", "circular", "replicate", "stride=2", "dilation=2", "bias=False"):
        if option in code:
            w.note(option, name)


def kind(w: Writer) -> str:
    """What the usual layer for the current value is called in the tables."""
    return {"2d": "conv2d", "1d": "conv1d", "tokens": "linear, tokens", "flat": "linear"}[w.layout]


def add_layer(w: Writer, out: int, plain: bool = False) -> str:
    """Write a layer and its call; returns its name."""
    code = layer(w, out, plain)
    name = w.member("lay", code)
    note_options(w, name, code)
    w.apply(name, kind(w))
    return name


@piece(*ALL, weight=14)
def one_layer(w: Writer) -> None:
    add_layer(w, w.number(2, 9))
    if w.flag():
        inner(w)


@piece(*SPATIAL, weight=3)
def depthwise(w: Writer) -> None:
    if w.width < 2:
        return
    bias = w.of(True, False)
    kernel, padding = w.of((1, 0), (3, 1))
    name = w.member(
        "deep",
        f"nn.Conv{len(w.space)}d({w.width}, {w.width}, {kernel}, padding={padding}, "
        f"groups={w.width}, bias={bias})",
    )
    w.let(f"self.{name}({{h}})", "depthwise", fresh=True)


@piece(*SPATIAL, fits=lambda w: w.width in (4, 6, 8))
def grouped(w: Writer) -> None:
    out = w.of(w.width, 2 * w.width)
    groups = w.of(2, w.width) if out > w.width else 2
    name = w.member("lay", f"nn.Conv{len(w.space)}d({w.width}, {out}, 1, groups={groups})")
    w.apply(name, "grouped")


@piece("2d", weight=2, fits=lambda w: max(w.space) <= 3)
def transposed_2d(w: Writer) -> None:
    options = w.of("2, stride=2", "3, padding=1", "3, stride=2, padding=1, output_padding=1")
    bias = w.of(True, False)
    groups = 2 if w.width % 2 == 0 and w.number(0, 7) == 7 else 1
    out = w.number(2, 6) if groups == 1 else w.width
    code = f"nn.ConvTranspose2d({w.width}, {out}, {options}, bias={bias}, groups={groups})"
    w.apply(w.member("lay", code), "transposed conv2d")


@piece("1d", fits=lambda w: max(w.space) <= 3)
def transposed_1d(w: Writer) -> None:
    name = w.member("lay", f"nn.ConvTranspose1d({w.width}, {w.number(2, 6)}, 2, stride=2)")
    w.apply(name, "transposed conv1d")


@piece("2d", weight=2)
def channels_last_linear(w: Writer) -> None:
    width = w.width
    w.let("{h}.permute(0, 2, 3, 1)", "permute")
    if w.flag():
        w.let(w.of("F.gelu({h})", "F.relu({h})"))
    name = w.member("lay", f"nn.Linear({width}, {w.number(2, 9)})")
    w.apply(name, "linear, channels last")
    w.let("{h}.permute(0, 3, 1, 2)", "permute")


@piece("1d")
def transposed_linear(w: Writer) -> None:
    name = w.member("lay", f"nn.Linear({w.width}, {w.number(2, 9)})")
    w.let("{h}.transpose(1, 2)", "transpose")
    w.apply(name, "linear, channels last")
    w.let("{h}.transpose(1, 2)", "transpose")


@piece("tokens")
def convolution_over_tokens(w: Writer) -> None:
    name = w.member("lay", f"nn.Conv1d({w.width}, {w.number(2, 9)}, 3, padding=1)")
    w.let("{h}.transpose(1, 2)", "transpose")
    w.apply(name, "conv1d")
    w.let("{h}.transpose(1, 2)", "transpose")


@piece("tokens")
def linear_over_tokens(w: Writer) -> None:
    name = w.member("lay", f"nn.Linear({w.space[0]}, {w.space[0]})")
    w.note("read over another dimension")
    w.let(f"self.{name}({{h}}.transpose(1, 2)).transpose(1, 2)", layer=name)


@piece("2d", "1d")
def linear_over_columns(w: Writer) -> None:
    name = w.member("lay", f"nn.Linear({w.space[-1]}, {w.space[-1]})")
    w.note("read over another dimension")
    w.let(f"self.{name}({{h}})", layer=name)


@piece(*ALL)
def called_twice(w: Writer) -> None:
    name = w.member("lay", layer(w, w.width, plain=True))
    w.apply(name, "called twice")
    activation(w)
    w.apply(name, "called twice")


@piece(*ALL)
def tied(w: Writer) -> None:
    code = layer(w, w.width, plain=True)
    first, second = w.member("lay", code), w.member("lay", code)
    w.setup(f"self.{second}.weight = self.{first}.weight")
    w.apply(first, "tied")
    activation(w)
    w.apply(second, "tied")


@piece(*ALL)
def parametrized(w: Writer) -> None:
    name = w.member("lay", f"weight_norm({layer(w, w.number(2, 9))})")
    w.apply(name, "weight_norm")


@piece(*ALL, weight=2)
def frozen(w: Writer) -> None:
    name = w.member("lay", layer(w, w.number(2, 9)))
    which = w.of("weight", "bias", "all")
    if which == "all":
        w.setup(f"self.{name}.requires_grad_(False)")
    else:
        w.setup(f"if self.{name}.{which} is not None: self.{name}.{which}.requires_grad_(False)")
    w.apply(name, f"frozen {which}")


@piece(*SPATIAL, "flat", weight=2)
def keyword_call(w: Writer) -> None:
    name = w.member("lay", layer(w, w.number(2, 9)))
    w.apply(name, "called by keyword", "self.{m}(input={h})")


@piece("2d", "tokens", "flat")
def functional_weight(w: Writer) -> None:
    """A layer's weight is also used without calling the layer."""
    function = "F.conv2d" if w.layout == "2d" else "F.linear"
    make = "nn.Conv2d({0}, {0}, 1)" if w.layout == "2d" else "nn.Linear({0}, {0})"
    name = w.member("lay", make.format(w.width))
    before = w.now
    w.apply(name, "weight used elsewhere")
    if w.flag():
        activation(w)
    source = w.of(w.now, before)
    w.let(f"{function}({source}, self.{name}.weight) + {{h}}", "functional layer")


@piece("2d", "1d", weight=6)
def sequential(w: Writer) -> None:
    """Convolution, normalisation and activation in a container."""
    dims, out = len(w.space), w.number(2, 9)
    act = w.of("nn.ReLU()", "nn.ReLU(inplace=True)", "nn.GELU()", f"nn.PReLU({out})")
    code = convolution(w, out)
    name = w.member("seq", f"nn.Sequential({code}, nn.BatchNorm{dims}d({out}), {act})")
    w.note(f"read by conv{dims}d")
    w.let(f"self.{name}({{h}})", layer=f"{name}.0")
    for operation in (f"conv{dims}d", "batch norm", act):
        w.note(operation, f"{name}.0")
    note_options(w, f"{name}.0", code)


# Elementwise.

ACTIVATIONS = (
    "F.relu({h})",
    "F.gelu({h})",
    "F.silu({h})",
    "F.softplus({h})",
    "torch.sigmoid({h})",
    "torch.tanh({h})",
    "F.hardswish({h})",
    "F.leaky_relu({h}, 0.2)",
    "F.elu({h})",
    "{h}.cos()",
    "{h} + 1.0",
    "{h}.abs()",
    "{h}.clamp(-1.0, 1.0)",
    "torch.where({h} > 0, {h}, 0.5)",
    "{h} * {h}",
    "-{h}",
    "torch.exp(-{h} * {h})",
    "{h} * torch.sigmoid({h})",
)


def activation(w: Writer) -> None:
    """Write an elementwise function."""
    code = w.of(*ACTIVATIONS)
    w.let(code, code.replace("{h}", "h"))


@piece(*ALL, weight=12)
def elementwise(w: Writer) -> None:
    activation(w)


@piece(*ALL, weight=2, fits=lambda w: w.fresh)
def in_place(w: Writer) -> None:
    code = w.of("F.relu_({h})", "{h}.add_(1.0)", "F.relu({h}, inplace=True)", "{h}.mul_(2.0)")
    w.let(code, code.replace("{h}", "h"))


@piece(*ALL, weight=2)
def prelu(w: Writer) -> None:
    slopes = w.of(1, w.shape[1])
    name = w.member("act", f"nn.PReLU({slopes})")
    per = "PReLU per channel" if w.dim == 1 else "PReLU per token"
    w.let(f"self.{name}({{h}})", per if slopes > 1 else "PReLU")


@piece(*ALL, weight=2)
def dropout(w: Writer) -> None:
    if w.layout != "2d" or w.flag():
        name = w.member("drop", "nn.Dropout(0.3)")
    else:
        name = w.member("drop", "nn.Dropout2d(0.3)")
    w.let(f"self.{name}({{h}})", "dropout")


@piece(*ALL)
def detached(w: Writer) -> None:
    w.let(w.of("{h} + {h}.detach()", "{h} * {h}.detach().cos()"), "detach")


# Normalisation.


@piece("2d", "1d", "flat", weight=10, fits=lambda w: w.width > 1)
def batch_norm(w: Writer) -> None:
    options = w.of(
        "", "", "affine=False", "track_running_stats=False", "momentum=None", "momentum=0.5"
    )
    dims = 2 if w.layout == "2d" else 1
    name = w.member("norm", f"nn.BatchNorm{dims}d({', '.join([str(w.width), options])})")
    w.let(f"self.{name}({{h}})", "batch norm", fresh=True)
    if options:
        w.note(options)


@piece("tokens")
def batch_norm_of_tokens(w: Writer) -> None:
    name = w.member("norm", f"nn.BatchNorm1d({w.space[0]})")
    w.let(f"self.{name}({{h}})", "batch norm over tokens")


@piece("2d", "1d", weight=2, fits=lambda w: min(w.space) > 1)
def instance_norm(w: Writer) -> None:
    affine = w.flag()
    name = w.member("norm", f"nn.InstanceNorm{len(w.space)}d({w.width}, affine={affine})")
    w.let(f"self.{name}({{h}})", f"instance norm, affine={affine}")


@piece("2d", "1d")
def group_norm(w: Writer) -> None:
    groups = w.of(1, *(n for n in range(2, w.width + 1) if w.width % n == 0))
    if groups == w.width and max(w.space) == 1:
        groups = 1
    name = w.member("norm", f"nn.GroupNorm({groups}, {w.width})")
    w.let(f"self.{name}({{h}})", "group norm")


@piece("tokens", "flat", weight=2)
def layer_norm(w: Writer) -> None:
    name = w.member("norm", f"nn.LayerNorm({w.width}, elementwise_affine={w.of(True, False)})")
    w.let(f"self.{name}({{h}})", "layer norm over C")


@piece("2d", "1d", fits=lambda w: w.space[-1] > 1)
def layer_norm_over_columns(w: Writer) -> None:
    name = w.member("norm", f"nn.LayerNorm({w.space[-1]})")
    w.let(f"self.{name}({{h}})", "layer norm over columns")


# Pooling and sizes.


@piece("2d", "1d", weight=4, fits=lambda w: min(w.space) > 1)
def pool(w: Writer) -> None:
    n = len(w.space)
    code = w.of(
        f"F.max_pool{n}d({{h}}, 2)",
        f"F.avg_pool{n}d({{h}}, 2)",
        f"F.max_pool{n}d({{h}}, 3, 1, 1)",
        f"F.avg_pool{n}d({{h}}, 3, 1, 1)",
        f"F.adaptive_avg_pool{n}d({{h}}, 2)",
        f"F.adaptive_max_pool{n}d({{h}}, 2)",
    )
    w.let(code, code.split("(")[0])


@piece("2d", "1d", weight=2, fits=lambda w: max(w.space) <= 3)
def upsample(w: Writer) -> None:
    smooth = "bilinear" if w.layout == "2d" else "linear"
    mode = w.of("nearest", smooth)
    w.let(f"F.interpolate({{h}}, scale_factor=2.0, mode={mode!r})", f"upsample {mode}")


@piece("2d", "1d", "tokens", weight=2)
def flatten(w: Writer) -> None:
    w.let("{h}.flatten(1)", "flatten")
    add_layer(w, w.number(2, 9))


@piece("2d", "1d", "tokens", weight=2)
def mean_over_space(w: Writer) -> None:
    operation = w.of("mean", "amax")
    w.let(f"{{h}}.{operation}({w.space_dims})", f"{operation} over space")


@piece("2d", "1d", "tokens", weight=2)
def over_space(w: Writer) -> None:
    last = len(w.shape) - 1 if w.layout != "tokens" else 1
    code = w.of(
        "{h}.roll(1, DIM)",
        "{h}.flip(DIM)",
        "{h}.softmax(DIM)",
        "{h}.cumsum(DIM)",
        "{h} - {h}.mean(DIM, keepdim=True)",
        "{h} * {h}.amax(DIM, keepdim=True).sigmoid()",
    )
    w.let(code.replace("DIM", str(last)), code.replace("{h}", "h").replace("DIM", "space"))


@piece(*ALL)
def over_batch(w: Writer) -> None:
    w.let("{h} + 0.5 * {h}.roll(1, 0)", "roll over the batch")


# Channels moved.


@piece(*ALL, weight=3)
def channels_moved(w: Writer) -> None:
    d, c = w.dim, w.width
    half = max(1, c // 2)
    some = w.draw_order(c)
    front = ":, " * d
    code = w.of(
        f"{{h}}.flip({d})",
        f"torch.cat(({{h}}, -{{h}}), {d})",
        f"{{h}}.index_select({d}, torch.tensor({some}))",
        f"{{h}}[{front}{some}]",
        f"{{h}}.repeat_interleave(2, {d})",
        f"{{h}}.narrow({d}, 0, {half})",
        f"{{h}}[{front}1:]" if c > 2 else f"{{h}}.flip({d})",
        f"{{h}}.roll(1, {d})",
        f"torch.cat({{h}}.chunk(2, {d})[::-1], {d})",
        f"{{h}}.unbind({d})[0].unsqueeze({d}) * {{h}}",
    )
    w.let_if_small(code, MOST_VALUES, _stem(code, d))


def _stem(code: str, d: int) -> str:
    """A line without its numbers, for the tables."""
    names = {
        "flip": "flip channels",
        "(({h}, -{h})": "concat with itself",
        "index_select": "index_select channels",
        "repeat_interleave": "repeat_interleave channels",
        "narrow": "narrow channels",
        "roll": "roll channels",
        "chunk": "chunks swapped",
        "unbind": "times one channel",
        "1:]": "slice of channels",
    }
    return next((name for mark, name in names.items() if mark in code), "channels by index")


@piece("2d", "1d", fits=lambda w: w.width in (4, 6, 8, 9))
def shuffle(w: Writer) -> None:
    groups = 3 if w.width == 9 else 2
    sizes = ", ".join(map(str, w.space))
    w.let(
        f"{{h}}.view(-1, {groups}, {w.width // groups}, {sizes}).transpose(1, 2)"
        f".reshape(-1, {w.width}, {sizes})",
        "channel shuffle",
    )


@piece("2d", "1d", "flat")
def padded_channels(w: Writer) -> None:
    zeros = "0, 0, " * len(w.space)
    w.let_if_small(f"F.pad({{h}}, ({zeros}{w.number(0, 2)}, 1))", MOST_VALUES, "pad channels")


@piece("2d")
def unfolded(w: Writer) -> None:
    code = f"F.unfold({{h}}, 1).view(-1, {w.width}, {w.space[0]}, {w.space[1]})"
    w.let(code, "unfold, hard-coded view")


# Values joined.


@piece(*ALL, weight=5, fits=lambda w: bool(w.like_now()))
def join(w: Writer) -> None:
    other = w.of(*w.like_now())
    code = w.of(
        "{h} + OTHER",
        "{h} * OTHER",
        "torch.maximum({h}, OTHER)",
        "{h} * OTHER.sigmoid()",
        "{h} - 2 * OTHER",
        "torch.where(OTHER > 0, {h}, 0.0)",
    )
    operation = code.replace("{h}", "h").replace("OTHER", "k")
    w.note(operation, *w.makers[other])
    w.let(code.replace("OTHER", other), operation)


@piece(*ALL, weight=5, fits=lambda w: bool(w.beside_now()))
def concat(w: Writer) -> None:
    others = [w.of(*w.beside_now())]
    if w.number(0, 3) == 3:
        others.append(w.of(*w.beside_now(), w.now))
    for other in others:
        w.note("concat", *w.makers[other])
    names = [w.now, *others]
    if w.flag():
        names.reverse()
    w.let_if_small(f"torch.cat(({', '.join(names)}), {w.dim})", MOST_VALUES, "concat")


def inner(w: Writer) -> None:
    """An activation, often after a normalisation."""
    if w.layout != "tokens" and w.flag():
        batch_norm(w)
    activation(w)


@piece(*ALL, weight=6)
def residual(w: Writer) -> None:
    start, out = w.now, w.width
    add_layer(w, w.number(2, 9), plain=True)
    inner(w)
    if w.number(0, 2) == 2 and w.layout in SPATIAL:
        depthwise(w)
        activation(w)
    add_layer(w, out, plain=True)
    w.note("residual add", *w.makers[start])
    w.let(w.of(f"{start} + {{h}}", f"{{h}} + F.relu({start})"), "residual add")


@piece(*ALL, weight=4)
def gated_unit(w: Writer) -> None:
    """Two layers multiplied, as in GLU."""
    start, width = w.now, w.number(2, 9)
    gate, act = add_layer(w, width, plain=True), w.of("F.silu", "torch.sigmoid", "F.gelu", "")
    if act:
        w.let(f"{act}({{h}})")
    kept, w.now = w.now, start
    up = add_layer(w, width, plain=True)
    w.note("GLU product", gate, up)
    w.let(f"{kept} * {{h}}")
    add_layer(w, w.number(2, 9))


@piece(*ALL)
def glu_by_halves(w: Writer) -> None:
    add_layer(w, 2 * w.number(2, 4))
    w.let(f"F.glu({{h}}, {w.dim})", "halves multiplied")


@piece("2d", "1d", weight=4)
def squeeze_excite(w: Writer) -> None:
    start, width = w.now, w.width
    linear = w.flag()
    w.let(f"{{h}}.mean({w.space_dims}, keepdim={not linear})", "mean over space")
    make = "nn.Linear({}, {})" if linear else f"nn.Conv{len(w.space)}d({{}}, {{}}, 1)"
    squeezed = w.number(2, 4)
    name = w.member("lay", make.format(width, squeezed))
    w.apply(name, "squeeze")
    w.let("F.relu({h})", "F.relu(h)")
    second = w.member("lay", make.format(squeezed, width))
    w.apply(second, "excite")
    view = f".view(-1, {width}, {', '.join('1' * len(w.space_of(start)))})" if linear else ""
    if linear and w.flag():
        view = "[:, :, None, None]" if len(w.space_of(start)) == 2 else "[:, :, None]"
    w.note("excited", *w.makers[start])
    w.let(f"{start} * torch.{w.of('sigmoid', 'tanh')}({{h}}){view}")


@piece("tokens", weight=5)
def attention(w: Writer) -> None:
    start, width = w.now, w.width
    heads, size = w.number(1, 3), w.number(1, 3)
    names = {}
    if w.flag():
        layer_norm(w)
    source = w.now
    for role in "qkv":
        w.now = source
        names[role] = w.member(
            "lay", f"nn.Linear({width}, {heads * size}, bias={w.of(True, False)})"
        )
        w.apply(names[role], f"attention {role}")
        split = w.of(f"-1, {size}", f"{heads}, {size}")
        made = w.let(f"{{h}}.view({{h}}.size(0), {{h}}.size(1), {split}).transpose(1, 2)")
        names[role + "h"] = made
    q, k, v = (names[role + "h"] for role in "qkv")
    if w.flag():
        w.let(f"F.scaled_dot_product_attention({q}, {k}, {v})")
    else:
        w.let(f"({q} @ {k}.transpose(2, 3) / {size} ** 0.5).softmax(-1) @ {v}")
    w.let("{h}.transpose(1, 2).flatten(2)")
    w.makers[w.now] = w.makers[v]
    out = w.member("lay", f"nn.Linear({heads * size}, {width})")
    w.apply(out, "attention o")
    w.note("residual add", *w.makers[start])
    w.let(f"{start} + {{h}}", "residual add")


@piece(*ALL, weight=2)
def sum_of_two_readers(w: Writer) -> None:
    """A value is read by two layers whose results are added: two consumers of one producer."""
    start, out = w.now, w.number(2, 9)
    add_layer(w, out, plain=True)
    first, w.now = w.now, start
    add_layer(w, out, plain=True)
    w.note("h + k", *w.makers[first])
    w.let(f"{first} + {{h}}", "h + k")


# Parameters and buffers of the width.


@piece(*ALL, weight=2)
def layer_scale(w: Writer) -> None:
    name = w.member("scale", f"nn.Parameter(torch.randn({w.width}))")
    code = w.of("{h} * self.NAME.view(VIEW)", "{h} + self.NAME.view(VIEW)")
    w.let(code.replace("NAME", name).replace("VIEW", w.per_channel), "parameter of shape C")


@piece(*ALL)
def scalar_parameter(w: Writer) -> None:
    name = w.member("scale", "nn.Parameter(torch.randn(1))")
    w.let(f"{{h}} * self.{name}", "scalar parameter")


@piece(*ALL)
def buffer(w: Writer) -> None:
    name = w.new("buf")
    w.setup(f"self.register_buffer({name!r}, torch.randn({w.width}))")
    w.let(f"{{h}} + self.{name}.view({w.per_channel})", "buffer of shape C")


@piece(*ALL)
def running_buffer(w: Writer) -> None:
    """A buffer that follows what passes by."""
    name = w.new("buf")
    w.setup(f"self.register_buffer({name!r}, torch.zeros(()))")
    w.note("running mean in a buffer")
    w.body.append("if self.training:")
    w.body.append(f"    self.{name}.mul_(0.9).add_(0.1 * {w.now}.detach().mean())")


@piece("2d", "1d", "tokens")
def parameter_of_space(w: Writer) -> None:
    shape = w.space if w.layout != "tokens" else (*w.space, 1)
    name = w.member("scale", f"nn.Parameter(torch.randn({', '.join(map(str, shape))}))")
    w.let(f"{{h}} * self.{name}", "parameter of the space")


# What must be refused for layers whose units go through it.


@piece(*ALL, weight=4)
def mixing(w: Writer) -> None:
    code = w.of(
        "{h}.softmax(DIM)",
        "{h} - {h}.mean(DIM, keepdim=True)",
        "{h}.cumsum(DIM)",
        "{h} / (1.0 + {h}.norm(dim=DIM, keepdim=True))",
        "{h}.sort(DIM).values",
        "{h} * {h}.mean()",
        "{h} + {h}.amax(DIM, keepdim=True)",
        "{h}.mean(DIM, keepdim=True) * {h}",
        "{h} * ({h} > {h}.median()).to({h})",
    )
    w.let(code.replace("DIM", str(w.dim)), code.replace("{h}", "h").replace("DIM", "C"))


@piece(*ALL, weight=3)
def width_dependent(w: Writer) -> None:
    """The value depends on how many channels there are, not on what the others hold."""
    size = f"{{h}}.size({w.dim})"
    front = ":, " * w.dim
    code = w.of(
        f"{{h}} / {size}",
        f"{{h}} * torch.linspace(0.5, 1.5, {size}, dtype={{h}}.dtype).view({w.per_channel})",
        f"2.0 * {{h}} if {size} > {w.width // 2} else {{h}}",
        f"{{h}}.reshape({{h}}.size(0), -1).reshape({str((-1, *w.shape[1:]))[1:-1]})",
        f"torch.cat(({{h}}[{front}:1], {{h}}[{front}1:] * 2.0), {w.dim})",
        f"{{h}} + {{h}}.new_ones({size}).sum()",
    )
    w.let(code, _width_name(code))


def _width_name(code: str) -> str:
    marks = {
        "linspace": "linspace over C",
        "if": "branch on the width",
        "reshape": "hard-coded view",
        "cat": "first channel apart",
        "new_ones": "sum of ones over C",
    }
    return next((name for mark, name in marks.items() if mark in code), "divided by the width")


@piece("2d", "1d", fits=lambda w: w.width > 1)
def response_norm(w: Writer) -> None:
    w.let("F.local_response_norm({h}, 3)", "local response norm")


@piece("2d")
def products_of_channels(w: Writer) -> None:
    code = "({h}.flatten(2) @ {h}.flatten(2).transpose(1, 2)).softmax(-1) @ {h}.flatten(2)"
    w.let(f"({code}).view_as({{h}})", "attention over C")
