"""Makes questions about photographs, with answers, from their captions and from the objects marked in them."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from examples.real_vlm.photographs import Photograph, hash_order
from icet_jax.data.published import VQA_SUFFIX


class Question(NamedTuple):
    """Holds a question about the photograph `photograph` (its name), of one of the types yes/no and number."""

    photograph: str
    text: str
    answer: str
    type: str


# {thing: words that may stand for it in a caption}. A caption that shows such a thing nearly always mentions it, so
# that it may be called absent where no caption has any of the words.
_THINGS = {
    "a dog": ("dog", "dogs", "puppy", "puppies", "greyhound", "greyhounds", "poodle", "retriever", "collie", "terrier"),
    "a horse": ("horse", "horses", "pony", "ponies"),
    "a cat": ("cat", "cats", "kitten", "kittens"),
    "a bird": ("bird", "birds", "duck", "ducks", "pigeons", "pigeon", "seagull", "seagulls"),
    "a bicycle": ("bicycle", "bicycles", "bike", "bikes", "biker", "bikers", "cyclist", "cyclists", "biking"),
    "a motorcycle": ("motorcycle", "motorcycles", "motorbike", "motorbikes", "bike", "bikes", "biker", "motocross"),
    "a car": ("car", "cars", "vehicle", "vehicles", "truck", "trucks", "van", "jeep", "racecar"),
    "a boat": ("boat", "boats", "kayak", "kayaks", "canoe", "raft", "ship", "sailboat", "kayaker", "rowing"),
    "a skateboard": ("skateboard", "skateboards", "skateboarder", "skateboarders", "skateboarding", "skateboarded"),
    "a surfboard": ("surfboard", "surfboards", "surfer", "surfers", "surfing", "surfs", "surf", "bodyboard"),
    "snow": ("snow", "snowy", "ski", "skier", "skiers", "skiing", "skis", "snowboarder", "snowboard", "snowboarding"),
    "a ball": ("ball", "balls", "football", "soccer", "basketball", "baseball", "volleyball", "tennis", "tennis"),
    "a swing": ("swing", "swings", "swinging"),
    "a train": ("train", "trains", "locomotive", "subway"),
    "a child": ("child", "children", "boy", "boys", "girl", "girls", "kid", "kids", "baby", "babies", "toddler",
                "toddlers", "infant"),
}  # fmt: skip
_AGREEING = 2  # captions that must mention a thing that is present, if there are so many
_MOST = 5  # largest number that is asked for


def from_captions(photographs: Sequence[Photograph]) -> list[Question]:
    """Returns yes/no questions; each thing is present as often as it is absent, so that its name tells nothing."""
    presence: dict[str, dict[str, bool]] = defaultdict(dict)
    for photograph in photographs:
        words = [set(re.findall(r"[a-z]+", caption.lower())) for caption in photograph.captions]
        for thing, names in _THINGS.items():
            mentions = sum(not caption.isdisjoint(names) for caption in words)
            if mentions == 0 or mentions >= min(_AGREEING, len(words)):
                presence[thing][photograph.name] = mentions > 0
    return _balanced(presence)


def from_objects(counts: Mapping[str, Counter[str]]) -> list[Question]:
    """Returns yes/no questions, balanced as above, and questions for numbers up to five.

    Args:
      counts: {photograph's name: number of objects of each category}, see `photographs.read_objects`.
    """
    presence: dict[str, dict[str, bool]] = defaultdict(dict)
    questions = []
    for photograph, objects in counts.items():
        for category, count in objects.items():
            presence[_with_article(category)][photograph] = count > 0
            if 1 <= count <= _MOST:
                text = f"How many objects of the kind '{category}' are in the image?{VQA_SUFFIX}"
                questions.append(Question(photograph, text, str(count), "number"))
    return [*_balanced(presence), *questions]


def _balanced(presence: Mapping[str, Mapping[str, bool]]) -> list[Question]:
    """Returns a question for each thing and photograph, as many with the answer yes as with no.

    Args:
      presence: {thing: {photograph's name: whether the thing is in it}}.
    """
    return [question for thing in presence for question in _balanced_about(thing, presence[thing])]


def _balanced_about(thing: str, presence: Mapping[str, bool]) -> Iterator[Question]:
    """Yields the questions about one thing."""
    answers = {answer: [name for name, value in presence.items() if value == answer] for answer in (True, False)}
    size = min(map(len, answers.values()))
    for answer, names in answers.items():
        for name in sorted(names, key=lambda name: hash_order(f"{thing}\n{name}"))[:size]:
            yield Question(name, f"Is there {thing} in the image?{VQA_SUFFIX}", "Yes" if answer else "No", "yes/no")


def _with_article(noun: str) -> str:
    """Returns a noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
