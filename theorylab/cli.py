"""The command `theorylab`: figures, claims, bench, info."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from theorylab.errors import ArgumentError, TheorylabError, UnknownNameError

_COMMANDS = ("figures", "claims", "bench", "info")
_EPILOG = "Exit status: 0 all is well; 1 a check failed or something broke; 2 the command cannot be carried out; 130 interrupted."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: arguments without the name of the program; those of the process unless given.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    own, forwarded = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    try:
        if argv and not argv[0].startswith("-") and argv[0] not in _COMMANDS:
            raise UnknownNameError.of("command", argv[0], _COMMANDS)
        arguments = _parser().parse_args(own)
        if forwarded and own[:1] != ["bench"]:
            raise ArgumentError(f"only bench passes arguments on to a script, got -- {' '.join(forwarded)}")
        arguments.forwarded = forwarded
        return arguments.run(arguments)
    except SystemExit as ending:  # argparse has printed help or what is wrong
        return ending.code if isinstance(ending.code, int) else 2
    except TheorylabError as error:
        print(f"theorylab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("theorylab: interrupted; what was written is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, as `head`, has had enough
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("theorylab", description="Figures, claims and benchmarks of theorylab.", epilog=_EPILOG)
    parser.set_defaults(run=lambda _: (parser.print_help(), 0)[1])
    commands = parser.add_subparsers(metavar="{" + ",".join(_COMMANDS) + "}")

    figures = _command(commands, "figures", _figures, "compute, judge and write figures", "family/name, a family, or a pattern such as 'moe/*'")
    figures.add_argument("--preset", default="paper", help="quick (seconds), paper (the default) or full (a GPU or hours)")
    figures.add_argument("--out", type=Path, default=Path("paper_figures/out"), help="folder for the pictures (default: %(default)s)")
    figures.add_argument("--force", action="store_true", help="compute again what is stored")
    figures.add_argument("--png", action="store_true", help="write PNG beside SVG")

    claims = _command(commands, "claims", _claims, "measure claims", "family.name, a family, or a pattern such as '*rate*'")
    size = claims.add_mutually_exclusive_group()
    size.add_argument("--fast", action="store_const", const="fast", dest="preset", default="fast", help="small cases (the default)")
    size.add_argument("--full", action="store_const", const="full", dest="preset", help="the cases that the statements deserve")
    claims.add_argument("--out", type=Path, help="JSON report, rewritten after each claim")

    bench = _command(commands, "bench", _bench, "run benchmarks", "name of a script in benchmarks/, or a pattern", progress=False)
    bench.usage = "theorylab bench [-h] [--list] [--json] [NAME ...] [-- ARGUMENTS OF THE SCRIPTS]"

    info = commands.add_parser("info", help="versions, devices, precision, cache", description="Versions, devices, precision, cache.")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    return parser


def _command(commands: Any, name: str, run: Callable, what: str, names: str, progress: bool = True) -> argparse.ArgumentParser:
    """A subcommand with the options that all of them share."""
    command = commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".", epilog=_EPILOG)
    command.add_argument("names", nargs="*", metavar="NAME", help=names + "; all unless given")
    command.add_argument("--list", action="store_true", help="list the names and do nothing")
    command.add_argument("--json", action="store_true", help="print one JSON document; the rest goes to standard error")
    if progress:
        command.add_argument("--family", action="append", default=[], help="one family; may be repeated")
        command.add_argument("--no-progress", action="store_true", help="no progress bar (none is drawn outside a terminal)")
    command.set_defaults(run=run)
    return command


def _wanted(arguments: argparse.Namespace, separator: str) -> list[str] | None:
    """Names and families as patterns; with both, the names are looked up within the families."""
    families, names = arguments.family, arguments.names
    for family in families:
        if separator in family:
            raise ArgumentError(f"--family takes a family, got {family!r}: give it as a NAME without --family")
    if not names:
        return families or None
    if not families:
        return names
    return [n if n.startswith(f + separator) else f"{f}{separator}{n}" for f in families for n in names]


def _progress(arguments: argparse.Namespace) -> bool:
    return not arguments.no_progress and sys.stderr.isatty()


def _say(arguments: argparse.Namespace) -> Callable[[str], None]:
    """Where running text goes: with --json standard output belongs to the document."""
    return lambda line: print(line, file=sys.stderr if arguments.json else sys.stdout, flush=True)


def _print_json(value: Any) -> None:
    from theorylab.lab.files import to_json

    sys.stdout.write(to_json(value))
    sys.stdout.flush()


def _print_list(arguments: argparse.Namespace, head: Sequence[str], rows: list[dict[str, Any]]) -> int:
    from theorylab.core.show import text_table

    if arguments.json:
        _print_json(rows)
    else:
        print(text_table(head, [[row[name] for name in head] for row in rows]))
    return 0


def _warn_broken(broken: dict[str, BaseException]) -> int:
    from theorylab.lab.files import blame

    for name, error in broken.items():
        print(f"theorylab: {name} cannot be loaded: {blame(error)}", file=sys.stderr)
    return int(bool(broken))


def _figures(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("MPLBACKEND", "Agg")  # pictures go to files, so no screen is needed
    from theorylab.lab import figures

    wanted = _wanted(arguments, "/")
    if arguments.list:
        broken = figures.discover()
        rows = [{"name": f.name, "presets": [p for p, s in f.presets.items() if s is not None], "source": f.source, "caption": f.caption}
                for f in (figures.select(wanted) if wanted or figures.registered() else [])]
        if not arguments.json:
            rows = [row | {"presets": ", ".join(row["presets"])} for row in rows]
        return max(_print_list(arguments, ("name", "presets", "source"), rows), _warn_broken(broken))
    say = _say(arguments)
    gallery = figures.run_figures(wanted, arguments.preset, arguments.out, _progress(arguments), arguments.force, png=arguments.png, say=say)
    if arguments.json:
        _print_json(gallery.to_dict())
    else:
        say(gallery.text())
        say(f"pictures are in {arguments.out}")
    return 0 if gallery.passed else 1


def _claims(arguments: argparse.Namespace) -> int:
    from theorylab.lab import claims

    wanted = _wanted(arguments, ".")
    if arguments.list:
        chosen, broken = claims.select(wanted)
        rows = [{"name": c.name, "presets": [p for p, s in (("fast", c.fast), ("full", c.full)) if s is not None], "source": c.source,
                 "statement": c.statement} for c in chosen]
        if not arguments.json:
            rows = [row | {"presets": ", ".join(row["presets"])} for row in rows]
        return max(_print_list(arguments, ("name", "presets", "source"), rows), _warn_broken(broken))
    say = _say(arguments)

    def show(outcome: claims.Outcome) -> None:
        say(f"{outcome.verdict:<9}  {outcome.name}  {outcome.seconds:.2f} s")

    report = claims.run(wanted, arguments.preset, _progress(arguments), arguments.out, show=show)
    if arguments.json:
        _print_json(report.to_dict())
    else:
        say("\n" + report.text())
    return 0 if report.passed else 1


def _bench(arguments: argparse.Namespace) -> int:
    from fnmatch import fnmatchcase

    from theorylab.lab.files import blame, checkout_folder, load_module

    folder = checkout_folder("benchmarks")
    scripts = {path.stem: path for path in sorted(folder.glob("[!_]*.py"))}
    patterns = arguments.names or ["*"]
    for pattern in arguments.names:
        if not any(fnmatchcase(name, pattern) for name in scripts):
            raise UnknownNameError.of("benchmark", pattern, scripts)
    chosen = {name: path for name, path in scripts.items() if any(fnmatchcase(name, p) for p in patterns)}
    modules, failed = {}, 0
    for name, path in chosen.items():
        try:
            modules[name] = load_module(path)
        except Exception as error:
            failed = 1
            print(f"theorylab: {path.name} cannot be loaded: {blame(error)}", file=sys.stderr)
    if arguments.list:
        rows = [{"name": n, "what": ((m.__doc__ or "").strip().splitlines() or [""])[0]} for n, m in modules.items()]
        return max(_print_list(arguments, ("name", "what"), rows), failed)
    forwarded = ["--json"] * arguments.json + arguments.forwarded
    for name, module in modules.items():
        if not callable(getattr(module, "main", None)):
            failed = 1
            print(f"theorylab: {name} has no main(argv)", file=sys.stderr)
            continue
        try:
            failed |= bool(module.main(forwarded))
        except Exception as error:
            failed = 1
            print(f"theorylab: {name} broke: {blame(error)}", file=sys.stderr)
    return int(failed)


def _info(arguments: argparse.Namespace) -> int:
    from theorylab import runtime

    made_by, folder = runtime.provenance(), runtime.cache_folder()
    files = [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    # What this process may use can be less than the machine has; only some systems tell.
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    precision = "64-bit (float32 data stays float32)" if made_by["x64"] else "32-bit (JAX_ENABLE_X64 is 0)"
    facts: dict[str, Any] = {"versions": made_by["versions"], "devices": made_by["devices"], "precision": precision, "threads": threads,
                             "cache": {"folder": str(folder), "files": len(files), "bytes": sum(p.stat().st_size for p in files)}}
    if arguments.json:
        _print_json(facts)
        return 0
    devices, cache = facts["devices"], facts["cache"]
    lines = [*facts["versions"].items(), ("device", f"{devices['count']} x {devices['kind']} ({devices['backend']})"),
             ("precision", precision), ("threads", threads), ("cache", f"{cache['folder']} ({cache['files']} files, {cache['bytes'] / 1e6:.1f} MB)")]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
