"""Short stories from interchangeable parts, so that streams of some length exist."""

import random
from typing import Final

from demo_text.shapes import Question

HEROES: Final = (
    ("fox", "Rusty"), ("rabbit", "Clover"), ("bear", "Bruno"), ("owl", "Olive"), ("cat", "Mimi"), ("dog", "Bello"),
    ("mouse", "Pip"), ("robot", "Bolt"), ("dragon", "Ember"), ("turtle", "Tilda"), ("girl", "Anna"),
    ("boy", "Tom"), ("sailor", "Finn"), ("baker", "Rosa"), ("knight", "Arthur"), ("penguin", "Paul"),
    ("GPU", "Hopper"), ("server", "Cora"), ("worker", "Max"), ("wizard", "Merle"),
)  # fmt: skip
_PLACES: Final = (
    "in a quiet forest", "at the edge of a small town", "on a green hill", "beside a wide river",
    "on an island in the north", "in a tall tower", "in an old mill", "near the sea", "in a busy data centre",
    "under a big oak tree", "in a village between two mountains",
)  # fmt: skip
_WISHES: Final = (
    ("to see the ocean", "the blue ocean"), ("to find a lost key", "the lost key"),
    ("to learn a new song", "a new song"),
    ("to carry a letter to the king", "the king's castle"), ("to reach the highest hill", "the highest hill"),
    ("to win the relay race", "the finish line"), ("to build a bridge", "the finished bridge"),
    ("to find a friend", "a true friend"), ("to light the old lighthouse", "the bright lighthouse"),
)  # fmt: skip
_TROUBLES: Final = (
    "a storm came up and the path was gone", "the night fell and it was too dark to go on",
    "a deep river blocked the way", "the map was blown away by the wind", "all strength was used up halfway",
    "a heavy stone lay across the road", "the bridge broke with a loud crack", "thick fog covered everything",
)  # fmt: skip
_HELPERS: Final = (
    "an old crow", "a kind stranger", "a small hedgehog", "a wise turtle", "a merry fisherman", "a little firefly",
    "a shy deer", "the neighbour's goose", "a travelling singer",
)  # fmt: skip
_HELP: Final = (
    'said, "Give me what you carry, I will take it from here."', 'said, "Follow me, I know another way."',
    'said, "Rest a while, and then we go together."', 'said, "Do not give up, it is only one more step."',
    "showed the way with a tiny lamp", "shared some bread and told a good joke", "lent a strong rope",
)  # fmt: skip
_MORALS: Final = (
    "Nobody has to go the whole way alone.", "What one begins, another may finish.", "A pause is not the end.",
    "Small steps also lead to the goal.", "Good friends are worth more than good luck.",
    "And nothing that mattered was lost on the way.",
)  # fmt: skip
_ENDINGS: Final = (
    "That evening everybody sang and danced.", "They stayed friends for the rest of their lives.",
    "From then on they travelled together.", "The whole village came to hear the tale.",
    "They laughed, and the moon laughed with them.", "It was the happiest day of the year.",
)  # fmt: skip
ASKS: Final = (
    "Tell me a story about a {x}.", "tell me a story about a {x}", "Write a story about a {x}.",
    "Write a short story about a {x}.", "Tell me a short story about a {x}.", "A story about a {x}, please.",
    "Can you tell me a story about a {x}?", "I want a story about a {x}.", "story about a {x}",
    "Please tell me a story about a {x}.", "Tell me a bedtime story about a {x}.",
    "Tell me a tale about a {x}.", "Do you know a story about a {x}?",
)  # fmt: skip
ASKS_ANY: Final = (
    "Tell me a story.", "tell me a story", "Write a story.", "Write a short story.", "Tell me a short story.",
    "Tell me a bedtime story.", "A story, please.", "Can you tell me a story?", "Another story, please.",
    "I am bored.", "Read me a story.", "Do you know a story?",
)  # fmt: skip
ASKS_LONG: Final = (
    "Tell me a long story about a {x}.", "Write a long story about a {x}.", "A long story about a {x}, please.",
    "tell me a long story about a {x}",
)  # fmt: skip
ASKS_HELD_OUT: Final = (
    "Could you write a story about a {x}?", "I would like to hear a story about a {x}.",
    "Make up a story about a {x}.",
)  # fmt: skip


def _trial(rng: random.Random, name: str, opening: str) -> list[str]:
    helper = rng.choice(_HELPERS)
    trouble = f"{opening} {rng.choice(_TROUBLES)}."
    despair = rng.choice((f"{name} sat down and did not know what to do.", f"{name} almost turned back."))
    help_came = ("Then {h} came by", "Just then {h} came along")[rng.random() >= 0.5].format(h=helper)
    return [trouble, despair, f"{help_came} and {rng.choice(_HELP).rstrip('.')}."]


def story(rng: random.Random, kind: str, name: str, *, long: bool = False) -> str:
    """Return a story of about 100 tokens (about 220 if ``long``) whose hero is a ``kind`` called ``name``."""
    wish, goal = rng.choice(_WISHES)
    lines = [
        f"Once upon a time a {kind} named {name} lived {rng.choice(_PLACES)}.",
        rng.choice((f"{name} had only one wish: {wish}.", f"More than anything, {name} wanted {wish}.")),
        f"One {rng.choice(('bright', 'cold', 'windy', 'golden'))} morning {name} packed a small bag and set out.",
        *_trial(rng, name, rng.choice(("But soon", "After some hours"))),
    ]
    if long:
        lines += [
            f"So {name} went on, with new courage.",
            f"They crossed {rng.choice(('a wide field', 'a silent wood', 'three narrow valleys'))} and talked all day.",
            *_trial(rng, name, "But on the second day"),
            f"For a moment everything seemed lost, but {name} remembered why the journey had begun.",
        ]
    lines += [
        f"So {name} tried once more, and at last there it was: {goal}.",
        rng.choice(_ENDINGS),
        rng.choice(_MORALS),
    ]
    return " ".join(line.replace('.".', '."') for line in lines)


def request(rng: random.Random, *, held_out: bool = False) -> Question:
    """Ask for a story; one about the asked-for hero is correct."""
    kind, name = rng.choice(HEROES)
    if held_out:
        return Question("stories", rng.choice(ASKS_HELD_OUT).format(x=kind), "", (kind, name))
    style = rng.random()
    long = style > 0.85
    asks = ASKS_ANY if style < 0.2 else ASKS_LONG if long else ASKS
    return Question("stories", rng.choice(asks).format(x=kind), story(rng, kind, name, long=long), (kind, name))


def any_story(rng: random.Random) -> str:
    """Return a story about a random hero."""
    return story(rng, *rng.choice(HEROES))
