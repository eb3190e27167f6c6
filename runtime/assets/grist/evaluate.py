"""Put the 200 held-out questions to grist and print how many it gets right, per skill and in total.

    python -m millrace.runtime.assets.grist.evaluate

Greedy, in plain torch. In a question of several turns grist meets its own replies, as it would in use. A reply is
right if it ends by itself and contains what the question expects as whole words; a story must also have five to twelve
sentences.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from millrace.runtime.assets.grist.corpus import EXAM_SEED, Examination, Turn, exam
from millrace.runtime.assets.grist.model import Grist, load
from millrace.runtime.assets.grist.text import prompt_ids

HERE = Path(__file__).parent
MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """What grist replied to one question, and whether that is right."""

    test: Examination
    reply: str
    ended: bool

    @property
    def right(self) -> bool:
        """See the head of this file."""
        if not self.ended or not any(contains(self.reply, expected) for expected in self.test.expect):
            return False
        return self.test.skill != "stories" or 5 <= sentences(self.reply) <= 12


def sentences(text: str) -> int:
    """How many sentences `text` has; what somebody says within a sentence does not count apart."""
    return len(re.findall(r"[.!?]\"?(?= [A-Z\"]|$)", text))


def contains(reply: str, expected: str) -> bool:
    """Whether `expected` stands in `reply` as whole words, in whatever case."""
    # The negative looks around, unlike \b, also serve an expectation that begins or ends with a sign.
    return re.search(rf"(?<!\w){re.escape(expected.lower())}(?!\w)", reply.lower()) is not None


class Examiner:
    """A checkpoint folder that answers."""

    def __init__(self, folder: Path) -> None:
        self._model: Grist = load(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def reply(self, turns: list[Turn], user: str, system: str = "") -> tuple[str, bool]:
        """The reply to `user` after `turns`, and whether it ended by itself."""
        ids, ended = self._model.generate(prompt_ids(self._tokenizer, turns, user, system), MAX_TOKENS)
        return self._tokenizer.decode(ids), ended

    def examine(self, tests: Iterable[Examination]) -> list[Outcome]:
        """Put every question, each in a conversation of its own."""
        outcomes = []
        for test in tests:
            turns: list[Turn] = []
            ended = False
            for user in test.users:
                reply, ended = self.reply(turns, user)
                turns.append(Turn(user, reply))
            outcomes.append(Outcome(test, turns[-1].reply, ended))
        return outcomes


def main() -> None:
    """Read the command line, examine, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE, help="checkpoint folder")
    parser.add_argument("--seed", type=int, default=EXAM_SEED, help="another seed draws other held-out questions")
    parser.add_argument("--wrong", action="store_true", help="print every wrong reply")
    arguments = parser.parse_args()
    outcomes = Examiner(arguments.model).examine(exam(arguments.seed))
    asked = Counter(outcome.test.skill for outcome in outcomes)
    right = Counter(outcome.test.skill for outcome in outcomes if outcome.right)
    if arguments.wrong:
        for outcome in outcomes:
            if not outcome.right:
                print(f"{' / '.join(outcome.test.users)}\n    {outcome.reply}   (expected: {outcome.test.expect[0]})")
    for skill, count in asked.items():
        print(f"{skill:10}  {right[skill]:3} of {count:3}  {right[skill] / count:6.1%}")
    print(f"{'total':10}  {right.total():3} of {asked.total():3}  {right.total() / asked.total():6.1%}")


if __name__ == "__main__":
    main()
