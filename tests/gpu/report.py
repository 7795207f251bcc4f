"""The results of the stages so far: a state file for the command and a page for readers, written after each stage."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from command import UserError

FINISHED, FAILED, SKIPPED, UNFINISHED = "finished", "failed", "skipped", "unfinished"


@dataclass
class Outcome:
    """The outcome of a stage. result: FINISHED, FAILED, SKIPPED or UNFINISHED. why: the reason unless it has finished.

    shows: Markdown for the page. command: the stage's command line. commit: of the code.
    """

    result: str
    why: str = ""
    seconds: float = 0.0
    shows: str = ""
    command: str = ""
    commit: str = ""


class Report:
    """The outcomes in a folder, by the names of their stages. machine: lines about it; the first names the device.

    Raises UserError if the folder cannot be written, or contains results of another device.
    """

    def __init__(self, folder: Path, machine: list[str], names: list[str]):
        self._folder, self._machine, self._names = folder, machine, names
        self.page = folder / "page.md"
        self.outcomes: dict[str, Outcome] = {}
        state = self._state
        try:
            (folder / "logs").mkdir(parents=True, exist_ok=True)
            if state.exists():
                found = json.loads(state.read_text())
                if found["device"] != machine[0]:
                    raise UserError(f"OUT={folder}: holds results of {found['device']}; name another folder with OUT")
                self.outcomes = {name: Outcome(**outcome) for name, outcome in found["stages"].items()}
            self._write()
        except OSError as error:
            raise UserError(f"OUT={folder}: cannot be written ({error.strerror}); name another folder") from None
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{state}: is damaged; remove it to start over, or name another folder with OUT") from None

    @property
    def _state(self) -> Path:
        return self._folder / "state.json"

    def result(self, name: str) -> str:
        return self.outcomes[name].result if name in self.outcomes else ""

    def note(self, name: str, outcome: Outcome) -> None:
        self.outcomes[name] = outcome
        self._write()

    def _write(self) -> None:
        state = {"device": self._machine[0], "stages": {name: asdict(each) for name, each in self.outcomes.items()}}
        for path, text in ((self._state, json.dumps(state, indent=1) + "\n"), (self.page, self._text())):
            aside = path.with_name(path.name + ".new")
            aside.write_text(text)
            os.replace(aside, path)

    def _text(self) -> str:
        rows = ["| stage | result | seconds | |", "|---|---|---:|---|"]
        for name in self._names:
            each = self.outcomes.get(name)
            if each is None:
                rows.append(f"| {name} | | | |")
                continue
            # Results of one line are in the table, longer ones below it.
            text = each.why or ("" if "\n" in each.shows else each.shows)
            seconds = f"{each.seconds:.0f}" if each.seconds else ""
            rows.append(f"| {name} | {each.result} | {seconds} | {text.replace('|', '/')} |")
        sections = []
        for name in self._names:
            each = self.outcomes.get(name)
            if each and (each.result in (FAILED, UNFINISHED) or "\n" in each.shows):
                sections.append(f"## {name}\n\n`{each.command}`, commit {each.commit or 'unknown'}\n\n{each.shows}\n")
        done = sum(each.result == FINISHED for each in self.outcomes.values())
        head = [
            f"# {self._machine[0]}",
            "",
            *self._machine[1:],
            "",
            f"{done} of {len(self._names)} stages finished.",
            "",
        ]
        return "\n".join([*head, *rows, "", *sections])
