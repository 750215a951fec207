"""What does a command line take? Flags as one writes them elsewhere, too, an error of one line with
the nearest flag, and a flag for each hyperparameter."""

import argparse
import contextlib
import os
import re
import sys
from functools import partial

from files import nearest
from hparams import FIELDS, Hparams, checked, read_hparams, validate

HYDRA = r"[+~]*(?:\w+[.])*(\w+=\S+)"  # a value as Hydra takes it: a.b=c, +b=c
BOOLEANS = {
    "true": True,
    "1": True,
    "yes": True,
    "false": False,
    "0": False,
    "no": False,
    "none": False,  # which --no-ema stands for
}

# ---------------------------------------------------------------- the parser


def plain_flag(word):
    """--a_b, --x.a-b and --no-a-b as --a-b, --a-b and --a-b=none; other words as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.rpartition(".")[2].replace("_", "-")
    if name.startswith("no-") and not equals:
        return f"--{name[3:]}=none"
    return f"--{name}{equals}{value}"


class Parser(argparse.ArgumentParser):
    """argparse that takes flags as `plain_flag` does. An error is one line, with the flag or choice
    that is closest to the wrong one."""

    def __init__(self, **options):
        layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=100)
        super().__init__(formatter_class=layout, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(map(plain_flag, words), namespace)

    def _check_value(self, action, value):
        super()._check_value(action, value)
        if value == "" and action.metavar != "''":  # the metavar of flags that are '' by default
            name = "/".join(action.option_strings) or action.dest
            self.error(f"{name} is empty; give it a value or leave it out")
        hydra = re.fullmatch(HYDRA, str(value))
        if hydra and not action.option_strings and not os.path.exists(value):
            self.error(f"{value}: no such file; for a flag write --{hydra[1]}")

    def error(self, message):
        # argparse says "unrecognized arguments: --lrr 1", "invalid choice: 'x' (choose from a, b)"
        hydra = re.search(f"arguments: (?:-m )?{HYDRA}", message)
        wrong = re.search("(?:arguments|choice): '?([^ '=]+)", message)
        choices = re.findall(r"[\w-]+", message.partition("choose from")[2])
        hint = ""
        if hydra:
            hint = f"; use --{hydra[1]}"
        elif wrong:
            hint = nearest(wrong[1], choices or self._option_string_actions)
        self.exit(2, f"error: {message}{hint} (see --help)\n")


# ---------------------------------------------------------------- hyperparameters


def add_flags(parser, keys=FIELDS, title=None):
    """Add a flag for each key to a parser. Without a title they stand in the groups of the table,
    and --help shows their defaults. With one they stand under it, and --help shows no defaults:
    values that are not given come from elsewhere."""
    group = parser.add_argument_group(title)
    for key in keys:
        field = FIELDS[key]
        if field.metadata["group"] and not title:
            group = parser.add_argument_group(field.metadata["group"])
        # --ema alone is --ema=true
        options = {"nargs": "?", "const": "true"} if field.type is bool else {}
        group.add_argument(
            f"--{key.replace('_', '-')}",
            metavar=key.upper() if title else str(field.default) or "''",
            help=field.metadata["text"],
            **options,
        )


def parse_value(kind, text):
    """The value that a flag's text stands for, or the text itself if it stands for none: `checked`
    then refuses it."""
    if kind is bool:
        return BOOLEANS.get(text.lower(), text)
    with contextlib.suppress(ValueError):
        return kind(text)
    return text


def given_flags(args, keys=FIELDS):
    """{key: value} of the flags that parsed args hold. Raises UsageError."""
    values = {}
    for key in keys:
        text = getattr(args, key, None)
        if text is not None:
            values[key] = checked(key, parse_value(FIELDS[key].type, text), f"--{key}")
    return values


def trainer_parser(doc=None):
    """train.py's command line; here, so that a sweep knows its flags without torch."""
    parser = Parser(description=doc, usage="python train.py [--hparams FILE] [--key value ...]")
    add = parser.add_argument
    mirrors = "wandb", "tensorboard"
    add("--hparams", metavar="FILE", help="values to start from, JSON or YAML")
    add("--resume", action="store_true", help="go on with a run: --name NAME, or its folder")
    add("--rescore", action="store_true", help="with --resume: score anew, on changed val pages")
    add("--seeds", type=int, metavar="N", help="N replicas: seed, seed + 1, ...")
    add("--baseline", metavar="RUN", help="run folder to print the difference to, by epoch")
    add("--device", default="auto", help="cuda, cuda:1 or cpu (default: cuda where there is one)")
    add("--log", action="append", choices=mirrors, default=[], help="mirror of log.csv; repeatable")
    add("--artifact", action="store_true", help="best.pt as an artifact of --log wandb")
    add("--print-hparams", action="store_true", help="print the resolved JSON and stop")
    add_flags(parser)
    return parser


def resolve_hparams(args, saved=()):
    """Hparams of default < saved ones < --hparams < flags. Raises DataError, UsageError."""
    values = dict(saved)
    if args.hparams:
        values |= read_hparams(args.hparams)
    values |= given_flags(args)
    where = f"{args.hparams + ' and ' if args.hparams else ''}flags"  # either may hold the value
    return validate(Hparams(**values), where)
