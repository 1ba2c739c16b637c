"""Command-line pieces that every script shares. Nothing heavy is imported: --help and flag errors answer at once."""

import argparse
import dataclasses
import difflib
import sys
from typing import NoReturn, TypeVar, get_type_hints

from utils.errors import InputError
from utils.flag_aliases import FlagAliases, translate_flags
from utils.settings_file import expand_paths, find_config, is_settings_file, read_config

Options = TypeVar("Options")


def pick(args: argparse.Namespace, options_class: type[Options]) -> Options:
    """Fill a dataclass from the flags of the same names; nested dataclasses too. Other fields keep their defaults."""
    values = {}
    for name, field_type in get_type_hints(options_class).items():
        if dataclasses.is_dataclass(field_type):
            values[name] = pick(args, field_type)
        elif hasattr(args, name):
            values[name] = getattr(args, name)
    return options_class(**values)


def make_console_robust() -> None:
    """Print characters that the console cannot show, such as Chinese with LANG=C, as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class FlagParser(argparse.ArgumentParser):
    """Reports a mistake in one message, without the usage of a hundred flags."""

    config_may_be_a_name = False  # --config may also name a pipeline or a dataset's configuration, not a file of flags

    def __init__(self, *arguments, aliases: FlagAliases | None = None, **keywords) -> None:
        """aliases: the flags of another project that are accepted too."""
        make_console_robust()
        self.aliases, self.implied, self._given = aliases or FlagAliases(), [], []
        super().__init__(*arguments, **{"allow_abbrev": False, **keywords})

    def parse_known_args(self, args=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, with aliases, the flags of `--config FILE`, and "~" and environment variables expanded."""
        try:
            words = self._our_words(list(sys.argv[1:] if args is None else args))
        except InputError as error:
            self.exit(2, f"error: {error}\n")
        parsed, unknown = super().parse_known_args(words, namespace)
        if problems := expand_paths(parsed):
            self.exit(2, f"error: {InputError.from_problems(problems)}\n")
        return parsed, unknown

    def _our_words(self, words: list[str]) -> list[str]:
        """The command line with our names of flags and with those of the settings file. Raises InputError."""
        words, self.implied = translate_flags(words, self._option_string_actions, self.aliases)
        self._given = words
        if self.implied:
            print(f"as {self.aliases.project}: {' '.join(self.implied)} (where not given)", file=sys.stderr)
        if "--config" in self._option_string_actions:
            file, rest = find_config(words)
            if file is not None and (is_settings_file(file) or not self.config_may_be_a_name):
                words = [*read_config(file, self, rest), *rest]
        return [*self.implied, *words]

    def error(self, message: str) -> NoReturn:
        names = [word.partition("=")[0] for word in self._given if word.startswith("--") and word != "--"]
        unknown = [name for name in names if name not in self._option_string_actions]
        if unknown and "are required" in message:  # a required flag that is misspelled
            message = "; ".join([*map(self.describe_unknown, unknown), message])
        self.exit(2, f"error: {message} (see --help)\n")

    def parse_args(self, *arguments, **keywords) -> argparse.Namespace:
        """As argparse's, but an unknown flag is reported with the one that resembles it."""
        args, unknown = self.parse_known_args(*arguments, **keywords)
        if unknown:
            flags = [word for word in unknown if word.startswith("-")]
            self.exit(2, f"error: {'; '.join(map(self.describe_unknown, flags or unknown))}\n")
        return args

    def describe_unknown(self, word: str) -> str:
        """The message for an unknown word on the command line; suggests the flag that resembles it."""
        name = word.partition("=")[0]
        flags = [flag for action in self._actions for flag in action.option_strings]
        similar = difflib.get_close_matches(name, flags, n=1)
        return f"{name} is not a flag" + (f": did you mean {similar[0]}?" if similar else " (see --help)")


class DefaultsHelpFormatter(argparse.HelpFormatter):
    """Appends the default to the help of every flag that has one worth showing."""

    def _get_help_string(self, action: argparse.Action) -> str:
        has_no_default = action.default in (None, False, argparse.SUPPRESS) or "%(default)" in (action.help or "")
        return action.help or "" if has_no_default else f"{action.help} (default: %(default)s)"
