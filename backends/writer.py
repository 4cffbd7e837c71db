"""A writer of Python text: lines, indentation, names, and the spec lines that comments show."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from contextlib import contextmanager

from chunkc.ir.diagnostics import SourceFile, Span


class Writer:
    """Collects lines; `indented` nests them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def __call__(self, line: str = "") -> None:
        self.lines.append("    " * self.depth + line if line else "")

    @contextmanager
    def indented(self, head: str) -> Iterator[None]:
        self(head)
        self.depth += 1
        yield
        self.depth -= 1

    def paste(self, text: str) -> None:
        """A text of several lines, two lines below what is there."""
        self()
        self()
        for line in text.strip().splitlines():
            self(line)

    def text(self) -> str:
        return "\n".join(self.lines).rstrip() + "\n"


def unused(base: str, taken: set[str]) -> str:
    """The name, with a number behind it where it is taken; from then on it is taken itself."""
    out, n = base, 1
    while out in taken:
        n += 1
        out = f"{base}_{n}"
    taken.add(out)
    return out


class Lines:
    """Finds the line of the spec behind a span: `name.spec:14` and its text."""

    def __init__(self, source: SourceFile) -> None:
        self.source = source

    def place(self, span: Span | None) -> str:
        return self.source.place(span)

    def code(self, span: Span | None) -> str:
        """The spec's line, without its comment, and where it stands."""
        return "" if span is None else f"{self.line(span)}   {self.place(span)}"

    def line(self, span: Span) -> str:
        """The spec's line without its comment."""
        source = self.source.of(span.file)
        return source.line(source.position(span.start)[0]).split("#")[0].strip()


# Names that an emitted module uses for itself.
_MODULE_NAMES = """
torch nn F math Tensor ModuleType NamedTuple dataclass self seq scans ct device dtype given start count state new
check cu_seqlens initial_state output_final_state position step factory batch float int bool len tuple super next
range Sequences Weights axis_size check_offsets check_packing check_state check_tensors check_values compute_dtype
exact inv_softplus l2_norm lay layer_norm linear rms_norm softmax stopped use_kernels length row_of complex_type
Places Source attend larger scatter wide at at_rows d_logit d_value queries along_valid over_valid take check_position
Chunks operands BQ BR DOT PRECISION masked os once uncast states Any index any tl triton masked_sum vector
vector_reverse max_plus in_place overwrite tracked final before after upto onward halves levels log_gate ValueError
"""
MODULE_NAMES = frozenset(_MODULE_NAMES.split())


# What an emitted module calls the states, pointers and functions that it makes of others.
_MADE = re.compile(
    r"(next|state|now|new|score|chunks|seq|BLOCK)_\w+|\w+_(ptr|Scan|scan|step|scores|gradients|seen|mask)"
)


def identifier(name: str) -> str:
    """A Python identifier for a spec's name: keywords and names of the emitted module get an underscore behind, names
    like those that it makes of others one in front.

    So does such a name that has one already: two names of a spec never become one."""
    clean = re.sub(r"\W", "_", name)
    if _MADE.fullmatch(clean):
        return f"_{clean}"
    base = clean.rstrip("_")
    reserved = keyword.iskeyword(base) or base in MODULE_NAMES
    return clean + "_" if reserved else clean


# Attributes that a layer has itself, those of torch.nn.Module among them.
_RESERVED = """
T_destination add_module apply bfloat16 buffers call_super_init children compile cpu cuda double dump_patches eval
extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half init_state ipu load_state_dict
modules mtia named_buffers named_children named_modules named_parameters parameters register_backward_hook
register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ reset_parameters
set_extra_state set_submodule share_memory state_dict step to to_empty train training type xpu zero_grad
"""
RESERVED = frozenset(_RESERVED.split())


# What every emitted signature has beside the spec's names.
SIGNATURE = frozenset(
    (
        "self",
        "state",
        "device",
        "dtype",
        "batch",
        "check",
        "cu_seqlens",
        "in_place",
        "initial_state",
        "output_final_state",
        "position",
    )
)


def public(name: str) -> str:
    """What users call a parameter, input or state of the spec: its own name, unless Python or the signature has it."""
    base = name.rstrip("_")
    return name + "_" if keyword.iskeyword(base) or base in SIGNATURE else name


def is_name(id_: str) -> bool:
    """Whether a node's id is a name that the spec gave (or could have given)."""
    return re.fullmatch(r"[A-Za-z]\w*", id_) is not None


def quoted(text: str) -> str:
    """Text that may stand inside a docstring in triple double quotes."""
    return text.replace("\\", "\\\\").replace('"', "'")
