"""The command `chunkc`: each verb reads its arguments, calls the compiler and prints.

Results go to stdout, talk to stderr. Exit codes: 0 clean, 1 diagnostics, 2 usage, 3 a mistake of chunkc itself. What
a verb needs is imported when it runs: `check`, `fmt` and `explain` answer without torch."""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import platform
import re
import secrets
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from chunkc import __version__
from chunkc.ir.diagnostics import (
    MAX_BYTES,
    CompileError,
    Diagnostic,
    SourceFile,
    Span,
    error,
    render_github,
    render_json,
    render_text,
)

if TYPE_CHECKING:
    from chunkc.driver import Compiled

CLEAN, FOUND, BUG, INTERRUPTED = 0, 1, 3, 130
STDIN = "<stdin>"
Verb = TypeVar("Verb", bound=Callable[..., Any])


@dataclass
class Session:
    """What one run of the command has read and found, and how it is to speak."""

    color: bool | None = None
    traceback: bool = False
    sources: dict[str, SourceFile] = field(default_factory=dict)
    found: list[Diagnostic] = field(default_factory=list)

    def read(self, path: str, name: str | None = None) -> SourceFile:
        """The text of a file, or of stdin for `-`, under the name that diagnostics show."""
        from chunkc.dsl.uses import gather

        source = _stdin() if path == "-" else SourceFile.read(Path(path), name or path)
        with suppress(CompileError):  # what cannot be used is reported where the file is checked
            source = gather(source)
        self.sources |= {s.name: s for s in (source, *source.used)}
        return source

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Errors of what is inside are kept, and end it."""
        try:
            yield
        except CompileError as failure:
            self.found.extend(failure.diagnostics)

    @property
    def colored(self) -> bool:
        if self.color is not None:
            return self.color
        return not os.environ.get("NO_COLOR") and sys.stderr.isatty()

    def talk(self, text: str) -> None:
        click.echo(text, err=True, color=self.colored)

    def finish(self) -> int:
        """Show what was found, as text on stderr; the exit code."""
        for d in self.found:
            self.talk(render_text(d, self.sources, self.colored) + "\n")
        return FOUND if any(d.severity == "error" for d in self.found) else CLEAN


def _stdin() -> SourceFile:
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    span = Span(STDIN, 0, 0)
    if len(data) > MAX_BYTES:
        raise CompileError([error("too-large", f"'{STDIN}' is over 1 MiB", span)])
    try:
        return SourceFile(STDIN, data.decode("utf-8"))
    except UnicodeDecodeError:
        raise CompileError([error("cannot-read", f"'{STDIN}' is not UTF-8 text", span)]) from None


def _spec_files(args: Iterable[str]) -> list[str]:
    """The files that the arguments name, each once; a folder stands for the .spec files in it."""
    out: list[str] = []
    for arg in args:
        path = Path(arg)
        if arg != "-" and path.is_dir():
            inside = [p for p in path.rglob("*.spec") if not any(n.startswith(".") for n in p.relative_to(path).parts)]
            if not inside:
                raise click.UsageError(f"there is no .spec file in '{arg}'")
            out += [str(p) for p in sorted(inside)]
        else:
            out.append(arg)
    return list(dict.fromkeys(out))


@contextmanager
def _progress(files: list[str], label: str) -> Iterator[Iterable[str]]:
    """The files, with a bar on stderr while someone watches several of them."""
    if len(files) < 2 or not sys.stderr.isatty():
        yield files
    else:
        with click.progressbar(files, label=label, file=sys.stderr) as bar:
            yield bar


def _common(verb: Verb) -> Verb:
    """The options of every verb; they are kept in the session."""

    def keep(ctx: click.Context, param: click.Parameter, value: bool | None) -> None:
        if value is not None:
            setattr(ctx.ensure_object(Session), str(param.name), value)

    for option in (
        click.option("--traceback", is_flag=True, default=None, expose_value=False, callback=keep,
                     help="After a mistake of chunkc itself, show where it happened."),
        click.option("--color/--no-color", default=None, expose_value=False, callback=keep,
                     help="Color on or off; by default on if stderr is a terminal and NO_COLOR is not set."),
    ):  # fmt: skip
        verb = option(verb)
    return verb


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="chunkc %(version)s")
def cli() -> None:
    """Compile named-axis equations of sequence layers to PyTorch and Triton."""


# -- check -------------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--format", "form", type=click.Choice(["text", "json", "github"]), default="text", show_default=True,
              help="How diagnostics are written: text on stderr, the others on stdout.")  # fmt: skip
@_common
@click.pass_obj
def check(session: Session, files: tuple[str, ...], form: str) -> int:
    """Check spec files, folders of them, or stdin (-)."""
    from chunkc.driver import judge

    paths = _spec_files(files)
    with _progress(paths, "checking") as steps:
        for path in steps:
            with session.collecting():
                session.found.extend(judge(session.read(path)))
    if form == "json":
        click.echo(render_json(session.found, session.sources))
    elif form == "github":
        for d in session.found:
            click.echo(render_github(d, session.sources))
    else:
        session.finish()
        session.talk(_summary(session.found, len(paths)))
    return FOUND if any(d.severity == "error" for d in session.found) else CLEAN


def _summary(found: list[Diagnostic], files: int) -> str:
    errors = sum(d.severity == "error" for d in found)
    counts = [_count(n, what) for n, what in ((errors, "error"), (len(found) - errors, "warning")) if n]
    return f"{_count(files, 'file')} checked: {', '.join(counts) or 'nothing found'}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


# -- build -------------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("file")
@click.option("-o", "--out", "out", required=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="The folder that gets the package, itself a folder with the file's name.")  # fmt: skip
@click.option("--set", "chosen", multiple=True, metavar="NAME=VALUE", help="Fix a parameter; may be repeated.")
@click.option("--check", "only_check", is_flag=True, help="Write nothing; fail if the package is out of date.")
@click.option("--target", metavar="GPU", help="Compile the kernels for sm_80, sm_89, sm_90, sm_100, gfx942 or gfx950.")
@click.option("--aot", is_flag=True, help="Put the compiled kernels into the package; needs --target.")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True,
              help="With --target: the type of inputs.")  # fmt: skip
@_common
@click.pass_obj
def build(session: Session, file: str, out: Path, chosen: tuple[str, ...], only_check: bool, target: str | None,
          aot: bool, dtype: str) -> int:  # fmt: skip
    """Compile a spec file into a Python package."""
    from chunkc.ahead.targets import Ahead
    from chunkc.artifact import SettingError, read_setting, spec_name
    from chunkc.building import Built, build_source

    if file == "-":
        raise click.UsageError("a package has the name of its file: build does not read stdin")
    if aot and target is None:
        raise click.UsageError("--aot needs to know the GPU: --target sm_90, for example")
    built = Built(out)
    try:
        settings = dict(read_setting(text) for text in chosen)
        with session.collecting():
            ahead = None if target is None else Ahead(target, dtype, aot)
            built = build_source(session.read(file, spec_name(file)), out, settings, ahead, only_check)
            session.found.extend(built.warnings)
            if not only_check:
                click.echo(built.folder)
    except SettingError as reason:
        raise click.BadParameter(str(reason), param_hint="'--set'") from None
    for line in built.report:
        session.talk(line)
    if built.stale:
        session.talk(f"{built.folder} is out of date: {', '.join(built.stale)}")
    _show_as(session, spec_name(file), file)
    return max(session.finish(), FOUND if built.stale else CLEAN)


def _show_as(session: Session, name: str, path: str) -> None:
    """Let diagnostics show the path as it was given; emitted text has a name that is the same from everywhere."""

    def moved(span: Span) -> Span:
        return Span(path, span.start, span.end) if span.file == name else span

    if name in session.sources:
        session.sources[path] = session.sources[name]
    session.found = [
        replace(d, span=moved(d.span), related=tuple((moved(s), text) for s, text in d.related)) for d in session.found
    ]


# -- explain -----------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("what", metavar="FILE|CODE")
@click.option("--json", "as_json", is_flag=True, help="Write JSON.")
@click.option("--mask", is_flag=True, help="Draw what each query of the file's attentions sees.")
@click.option(
    "--length", default=64, show_default=True, type=click.IntRange(1, 1024), help="With --mask: of sequences."
)
@click.option("--set", "chosen", multiple=True, metavar="NAME=VALUE", help="With --mask or --shape: fix a parameter.")
@click.option("--mesh", multiple=True, metavar="NAME=N", help="Ranks along an axis of the layout's mesh.")
@click.option("--shape", metavar="AXIS=N,...", help="Estimate recurrences at sizes, as those of bench.")
@click.option("--machine", type=click.Choice(["a100", "h100", "h200", "mi300x"]), default="h100", show_default=True,
              help="With --shape: the accelerator.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True,
              help="With --shape: of the operands.")  # fmt: skip
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), metavar="PATH",
              help="With --mask: write a picture (needs the extra 'plot').")  # fmt: skip
@_common
@click.pass_obj
def explain(session: Session, what: str, as_json: bool, mask: bool, length: int, chosen: tuple[str, ...],
            mesh: tuple[str, ...], shape: str | None, machine: str, dtype: str, png: Path | None) -> int:  # fmt: skip
    """Say what was derived about a spec file, or what the code of a diagnostic means."""
    if what != "-" and re.fullmatch(r"[a-z][a-z0-9-]*", what) and not Path(what).is_file():
        text = _page(what)
        click.echo(json.dumps({"code": what, "text": text}, indent=2) if as_json else text.rstrip("\n"))
        return CLEAN
    from chunkc.building import stale
    from chunkc.driver import compile_source
    from chunkc.explain import mesh_sizes, place_asked, sizes_as_usage
    from chunkc.facts import facts, render_facts

    with session.collecting():
        compiled = compile_source(session.read(what))
        session.found.extend([*compiled.checked.warnings, *stale(compiled)])
        if mask or png is not None:
            _draw(compiled, length, chosen, png)
            return session.finish()
        with sizes_as_usage():
            found = facts(compiled, mesh_sizes(compiled, mesh), place_asked(shape, chosen, machine, dtype))
        click.echo(json.dumps(found, indent=2) if as_json else render_facts(found).rstrip("\n"))
    return session.finish()


def _draw(compiled: Compiled, length: int, chosen: tuple[str, ...], png: Path | None) -> None:
    """What each query sees, of the file's last layer or op that attends."""
    from chunkc.artifact import SettingError, read_setting
    from chunkc.ir.axes import SizeError
    from chunkc.picture import masks, save_png

    try:
        settings = dict(read_setting(text) for text in chosen)
        drawn = [p for unit in compiled.units for p in masks(unit, length, settings)]
    except (SettingError, SizeError) as reason:
        raise click.BadParameter(str(reason), param_hint="'--set'") from None
    if not drawn:
        raise click.UsageError("nothing in this file attends: there is no mask to draw")
    if png is None:
        click.echo("\n\n".join(p.text() for p in drawn))
        return
    try:
        save_png(drawn, png)
    except ImportError:
        raise click.UsageError("a picture needs matplotlib: install chunkc[plot]") from None
    except OSError as reason:
        raise click.UsageError(f"cannot write '{png}': {reason.strerror}") from None
    click.echo(png)


def _page(code: str) -> str:
    """The page that explains a code."""
    folder = resources.files("chunkc.errors")
    pages = {p.name.removesuffix(".md"): p for p in folder.iterdir() if p.name.endswith(".md")}
    if code not in pages:
        near = difflib.get_close_matches(code, pages, 1)
        more = f"; did you mean '{near[0]}'?" if near else ""
        raise click.UsageError(f"there is no file and no code '{code}'{more}")
    return pages[code].read_text(encoding="utf-8")


# -- fmt ---------------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("files", nargs=-1, required=True)
@click.option("--check", "only_check", is_flag=True, help="Write nothing; fail if a file is not formatted.")
@click.option("--diff", is_flag=True, help="Write nothing but the changes, to stdout; fail if there are any.")
@_common
@click.pass_obj
def fmt(session: Session, files: tuple[str, ...], only_check: bool, diff: bool) -> int:
    """Format spec files in place; - formats stdin to stdout."""
    from chunkc.dsl.format import format_source

    changes: list[tuple[SourceFile, str]] = []
    paths = _spec_files(files)
    writes = not (only_check or diff)
    with _progress(paths, "formatting") as steps:
        for path in steps:
            with session.collecting():
                source = session.read(path)
                text = format_source(source)
                if text != source.text:
                    changes.append((source, text))
                    if writes and source.path is not None:
                        _rewrite(source.path, text)
                if writes and source.path is None:
                    click.echo(text.encode("utf-8"), nl=False)
    for source, text in changes:
        if diff:
            click.echo(_diff(source, text), nl=False)
        if writes and source.path is None:
            continue
        session.talk(f"{'formatted' if writes else 'would format'} {source.name}")
    return max(session.finish(), FOUND if changes and not writes else CLEAN)


def _diff(source: SourceFile, text: str) -> str:
    lines = difflib.unified_diff(
        source.text.splitlines(keepends=True), text.splitlines(keepends=True), source.name, f"{source.name} (formatted)"
    )
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def _rewrite(path: Path, text: str) -> None:
    """Replace a file's text in one step, keeping its mode; a link stays a link."""
    path = path.resolve()
    new = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with new.open("xb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        new.chmod(path.stat().st_mode & 0o7777)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


# -- graph -------------------------------------------------------------------------------------------------------------

# The pass that brings a graph to a level; at the last one there are kernels, which the back end makes of the graph.
LEVELS = {"normal": "normalize", "chunked": "chunk", "fused": "fuse", "tiled": "fuse"}


@cli.command()
@click.argument("file")
@click.option("--level", type=click.Choice(["semantic", *LEVELS]), default="normal", show_default=True,
              help="As written, in normal form, with what is derived from each scan, or the kernels.")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["text", "dot", "svg"]), default="text", show_default=True,
              help="svg is a picture of the spec as written.")  # fmt: skip
@_common
@click.pass_obj
def graph(session: Session, file: str, level: str, form: str) -> int:
    """Print the graph of each layer and op of a spec file."""
    from chunkc.backends.triton.emit import print_kernels
    from chunkc.driver import check_source, compile_source
    from chunkc.ir.dot import as_dot
    from chunkc.ir.text import print_unit
    from chunkc.pipeline import upto

    if (level, form) == ("tiled", "dot"):
        raise click.UsageError("kernels are text alone")
    with session.collecting():
        source = session.read(file)
        if form == "svg":
            from chunkc.chart import chart

            checked = check_source(source)
            click.echo(chart(checked.module.units, checked.source), nl=False)
            return session.finish()
        if level == "semantic":
            checked = check_source(source)
            units = checked.module.units
        else:
            compiled = compile_source(source, upto(LEVELS[level]))
            checked, units = compiled.checked, compiled.units
        session.found.extend(checked.warnings)
        for unit in units:
            if form == "dot":
                text = as_dot(unit.graph, unit.name)
            elif level == "tiled":
                text = (f"{unit.kind} {unit.name}\n" if len(units) > 1 else "") + print_kernels(unit, source)
            else:
                text = print_unit(unit)
            click.echo(text, nl=False)
    return session.finish()


# -- bench -------------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--unit", metavar="NAME", help="A layer or op of the file; by default its last one.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Fix a parameter; may be repeated.")
@click.option("--shape", default="", metavar="AXIS=N,...", help="Sizes: B, T, H, K, V, or axes by the spec's names.")
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), help="By default bf16 on a GPU, fp32 on a CPU.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="By default the GPU if there is one.")
@click.option(
    "--against", default="auto", show_default=True, metavar="PEER,...", help="Peers by name, or auto or none."
)
@click.option("--json", "as_json", type=click.Path(dir_okay=False, path_type=Path), metavar="PATH", help="Write JSON.")
@click.option("--png", type=click.Path(dir_okay=False, path_type=Path), metavar="PATH",
              help="Draw a chart (needs the extra 'plot').")  # fmt: skip
@click.option("--limit-seconds", type=click.FloatRange(0, min_open=True), default=600, show_default=True,
              help="The time that each candidate gets.")  # fmt: skip
@_common
@click.pass_obj
def bench(session: Session, /, file: Path, as_json: Path | None, png: Path | None, **asked: Any) -> int:
    """Time an emitted layer or op against PyTorch's attention and fla, and against the memory limit."""
    from chunkc.bench.verb import run_verb
    from chunkc.building import stale
    from chunkc.driver import compile_source

    if str(file) == "-":
        raise click.UsageError("each candidate reads the file anew: bench does not read stdin")
    failed = CLEAN
    with session.collecting():
        compiled = compile_source(session.read(str(file)))
        session.found.extend([*compiled.checked.warnings, *stale(compiled)])
        failed = run_verb(compiled, file, as_json, png, asked, session.talk)
    return max(failed, session.finish())


# -- tune --------------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--unit", metavar="NAME", help="A layer or op of the file; by default its last one.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Fix a parameter; may be repeated.")
@click.option("--shape", default="", metavar="AXIS=N,...", help="Sizes to tune for, as those of bench.")
@click.option("--jobs", type=click.IntRange(1, 64), default=4, show_default=True,
              help="How many trials are compiled and checked at once.")  # fmt: skip
@click.option("--limit-seconds", type=click.FloatRange(0, min_open=True), default=600, show_default=True,
              help="The time that each trial gets.")  # fmt: skip
@_common
@click.pass_obj
def tune(session: Session, /, file: Path, **asked: Any) -> int:
    """Measure schedules of a spec's kernels on the GPU at hand, and write what builds of it take from then on."""
    from chunkc.driver import compile_source
    from chunkc.tune.verb import run_verb

    if str(file) == "-":
        raise click.UsageError("what is found is written beside the file: tune does not read stdin")
    with session.collecting():
        compiled = compile_source(session.read(str(file)), tuned=False)
        session.found.extend(compiled.checked.warnings)
        click.echo(run_verb(compiled, file, asked, session.talk))
    return session.finish()


# -- completion --------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@_common
def completion(shell: str) -> int:
    """Print a script that completes the command's verbs, options and files in a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "chunkc", "_CHUNKC_COMPLETE").source())
    return CLEAN


# -- lsp ---------------------------------------------------------------------------------------------------------------


@cli.command()
@_common
def lsp() -> int:
    """Serve an editor over stdin and stdout (needs the extra 'lsp')."""
    try:
        from chunkc.lsp import make_server
    except ImportError:
        raise click.UsageError("the language server needs pygls: install chunkc[lsp]") from None
    make_server().start_io()
    return CLEAN


# -- doctor ------------------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--clean", is_flag=True, help="Empty the cache.")
@_common
def doctor(clean: bool) -> int:
    """Print versions, the GPU, and where the cache is and how much it holds."""
    from chunkc.doctor import rows

    for name, value in rows(clean):
        click.echo(f"{name:9} {value}")
    return CLEAN


# -- running -----------------------------------------------------------------------------------------------------------


def run(args: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    session = Session(traceback=bool(os.environ.get("CHUNKC_TRACEBACK")))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may be no text, and a terminal may not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(args, prog_name="chunkc", standalone_mode=False, obj=session)
        sys.stdout.flush()
        return code if isinstance(code, int) else CLEAN
    except click.ClickException as usage:
        usage.show()
        return usage.exit_code
    except (click.Abort, KeyboardInterrupt):
        session.talk("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # who read stdout has enough; Python must not try to flush it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FOUND
    except Exception as mistake:
        if isinstance(mistake, OSError) and mistake.errno is not None and mistake.filename is not None:
            session.talk(f"chunkc: {mistake.filename}: {mistake.strerror}")
            return FOUND
        return _bug(session, mistake)


def _bug(session: Session, mistake: Exception) -> int:
    """Say that chunkc is at fault, and what a report of it needs."""
    if session.traceback:
        traceback.print_exception(mistake)
    first = (str(mistake).splitlines() or [""])[0][:200]
    session.talk(f"this is a bug in chunkc: {type(mistake).__name__}: {first}".rstrip(": "))
    session.talk(f"  chunkc {__version__}, Python {platform.python_version()}")
    if session.sources:
        source = list(session.sources.values())[-1]
        session.talk(f"  spec {source.name}, sha256 {hashlib.sha256(source.text.encode()).hexdigest()}")
    if not session.traceback:
        session.talk("  --traceback shows where; please report that, with the spec")
    return BUG


def main() -> None:
    """The entry point of the command."""
    sys.exit(run())
