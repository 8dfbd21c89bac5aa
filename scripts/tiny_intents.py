"""The intents of the embedded model: each draws a question's forms and the content of its answer.

A question's forms are separated by `|`; so are the sentences of an answer (see `tiny_styles.Reply`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tiny_facts as facts
from tiny_styles import Reply

MAX_TERM = 20
MAX_FACTOR = 10
NAME_FORMS = ("My name is {}.", "I am {}.", "Hi, I am {}.", "Hello, my name is {}!")


@dataclass(frozen=True, slots=True)
class Draw:
    """One question of an intent with its content; `rivals` are the intent's other answers."""

    forms: str
    reply: Reply
    kind: str = "chat"
    answer: str = ""
    rivals: tuple[str, ...] = ()


def greet_by_name(name: str) -> Reply:
    return Reply(
        terse=(f"Hi {name}",),
        plain=(f"Nice to meet you, {name}", f"Hello {name}"),
        formal=(f"I am honoured to meet you, {name}",),
    )


def _an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("u") else f"a {noun}"


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


def _chat(
    forms: str, terse: str, plain: str, cheerful: str = "", formal: str = ""
) -> Callable[[random.Random], Draw]:
    """An intent of small talk. Alternatives are separated by ` / ` in the answers."""
    reply = Reply(
        terse=tuple(terse.split(" / ")),
        plain=tuple(plain.split(" / ")),
        cheerful=tuple(cheerful.split(" / ")) if cheerful else (),
        formal=tuple(formal.split(" / ")) if formal else (),
    )
    return lambda rng: Draw(forms, reply)


def _calculation(forms: str, term: str, value: int, plain: str, formal: str) -> Draw:
    """Every style says the terms again: so small a model is right two times in three if it may not."""
    reply = Reply(
        terse=(f"{term} = {value}",),
        plain=(f"{plain} is {value}",),
        formal=(f"{formal} is {value}",),
    )
    return Draw(forms, reply, "number", str(value))


def _add(rng: random.Random) -> Draw:
    a, b = rng.randint(0, MAX_TERM), rng.randint(0, MAX_TERM)
    name = rng.choice(facts.NAMES)
    forms = (
        f"What is {a} + {b}?|What is {a} plus {b}?|{a} + {b}|{a}+{b}|{a} + {b} = ?|{a}+{b}=?"
        f"|How much is {a} plus {b}?|How much is {a} + {b}?|Add {a} and {b}.|What's {a} + {b}?"
        f"|Calculate {a} + {b}.|What is the sum of {a} and {b}?|{a} plus {b}"
        f"|{name} has {a} apples and gets {b} more. How many apples now?"
    )
    formal = f"The sum of {a} and {b}"
    return _calculation(forms, f"{a} + {b}", a + b, f"{a} plus {b}", formal)


def _subtract(rng: random.Random) -> Draw:
    a = rng.randint(0, MAX_TERM)
    b = rng.randint(0, a)
    name = rng.choice(facts.NAMES)
    forms = (
        f"What is {a} - {b}?|What is {a} minus {b}?|{a} - {b}|{a}-{b}|{a} - {b} = ?|{a}-{b}=?"
        f"|How much is {a} minus {b}?|Subtract {b} from {a}.|What's {a} - {b}?|{a} minus {b}"
        f"|Calculate {a} - {b}.|Take {b} away from {a}."
        f"|{name} has {a} apples and gives {b} away. How many are left?"
    )
    formal = f"The difference of {a} and {b}"
    return _calculation(forms, f"{a} - {b}", a - b, f"{a} minus {b}", formal)


def _multiply(rng: random.Random) -> Draw:
    a, b = rng.randint(0, MAX_FACTOR), rng.randint(0, MAX_FACTOR)
    forms = (
        f"What is {a} * {b}?|What is {a} times {b}?|{a} * {b}|{a}*{b}|{a} x {b}|{a} times {b}"
        f"|How much is {a} times {b}?|Multiply {a} by {b}.|What's {a} x {b}?|Calculate {a} * {b}."
    )
    formal = f"The product of {a} and {b}"
    return _calculation(forms, f"{a} * {b}", a * b, f"{a} times {b}", formal)


def _bigger(rng: random.Random) -> Draw:
    a, b = rng.sample(range(13), 2)
    forms = (
        f"Which is bigger, {a} or {b}?|Which number is larger: {a} or {b}?|What is more, {a} or {b}?"
        f"|bigger: {a} or {b}?|Is {a} or {b} the bigger number?"
    )
    bigger = str(max(a, b))
    reply = Reply(terse=(bigger,), plain=(f"The bigger number is {bigger}",))
    return Draw(forms, reply, "number", bigger)


def _count(rng: random.Random) -> Draw:
    first = rng.randint(0, 6)
    run = [str(n) for n in range(first, rng.randint(first + 2, 10) + 1)]
    listed = ", ".join(run)
    forms = (
        f"Count from {run[0]} to {run[-1]}.|Can you count from {run[0]} to {run[-1]}?"
        f"|Count {run[0]} to {run[-1]}|Please count from {run[0]} up to {run[-1]}."
    )
    reply = Reply(terse=(listed,), plain=(f"Here you go: {listed}",))
    return Draw(forms, reply, "sequence", " ".join(run))


def _lookup(
    table: dict[str, Any], forms: str, plain: str, formal: str = ""
) -> Callable[[random.Random], Draw]:
    """An intent that asks for `table[key]`.

    In the wordings {key} is the key, {a_key} has its article, {value} and {a_value} likewise.
    """
    keys, rivals = tuple(table), tuple(sorted({str(v) for v in table.values()}))

    def draw(rng: random.Random) -> Draw:
        key = rng.choice(keys)
        value = str(table[key])
        names = {"key": key, "a_key": _an(key), "value": value, "a_value": _an(value)}
        kind = "number" if value.isdigit() else "word"
        sentences = [_cap(s.format(**names)) for s in (plain, formal) if s]
        reply = Reply(terse=(_cap(value),), plain=(sentences[0],), formal=tuple(sentences[1:]))
        return Draw(forms.format(**names), reply, kind, value, rivals if kind == "word" else ())

    return draw


def _neighbour(cycle: tuple[str, ...], unit: str, step: int) -> Callable[[random.Random], Draw]:
    """The day or month after (`step` 1) or before (−1) another."""
    word, verb = ("after", "follows") if step == 1 else ("before", "precedes")
    table = {x: cycle[(i + step) % len(cycle)] for i, x in enumerate(cycle)}
    forms = (
        f"What {unit} comes {word} {{key}}?|Which {unit} {verb} {{key}}?|What {unit} is {word} {{key}}?"
        f"|Which {unit} is {word} {{key}}?|{unit} {word} {{key}}|What comes {word} {{key}}?"
    )
    return _lookup(table, forms, f"The {unit} {word} {{key}} is {{value}}")


def _fact(rng: random.Random) -> Draw:
    forms, answer, sentence = rng.choice(facts.FACTS)
    reply = Reply(terse=(answer,), plain=(sentence,))
    rivals = () if answer.isdigit() else tuple(a for _, a, _ in facts.FACTS if not a.isdigit())
    return Draw(forms, reply, "number" if answer.isdigit() else "word", answer, rivals)


def _introduce(rng: random.Random) -> Draw:
    name = rng.choice(facts.NAMES)
    return Draw("|".join(NAME_FORMS).format(*[name] * 4), greet_by_name(name))


def _joke(rng: random.Random) -> Draw:
    joke = rng.choice(facts.JOKES)
    forms = (
        "Tell me a joke.|Do you know a joke?|Make me laugh.|A joke, please.|Say something funny."
    )
    return Draw(forms, Reply(terse=(joke.split("|")[1],), plain=(joke,)))


def _story(rng: random.Random) -> Draw:
    hero, thing = rng.choice(facts.STORY_HEROES), rng.choice(facts.STORY_THINGS)
    place = rng.choice(facts.STORY_PLACES)
    forms = (
        f"Tell me a story about {_an(hero)}.|Tell me a story about {_an(hero)} and {_an(thing)}."
        f"|Write a story about {_an(hero)}.|A story about {_an(hero)}, please.|story about {_an(hero)}"
        f"|Can you tell a story about {_an(hero)}?|I want a story about {_an(hero)}."
    )
    if rng.random() < 0.3:
        forms = "Tell me a story.|A story, please.|Do you know a story?|Write a short story."
    found = f"found {_an(thing)} in the {place}"
    ends = (f"It took the {thing} home", f"It played with the {thing} all day", "It was very happy")
    a, b = rng.sample(ends, 2)
    opening = rng.choice(("One day", "Once"))
    return Draw(
        forms,
        Reply(
            terse=(f"{_cap(hero)} finds {thing} in the {place}",),
            plain=(f"{opening} {_an(hero)} {found}|{a}|{b}", f"{opening} {_an(hero)} {found}|{a}"),
            formal=(f"There once was {_an(hero)} that {found}|{a}",),
        ),
    )


# name: (weight in the corpus, generator)
INTENTS: dict[str, tuple[float, Callable[[random.Random], Draw]]] = {
    "add": (22, _add),
    "subtract": (18, _subtract),
    "multiply": (9, _multiply),
    "bigger": (2, _bigger),
    "count": (4, _count),
    "colour": (4, _lookup(
        {(k if k[:2] in ("a ", "an") else f"the {k}" if k in ("sky", "sea", "grass", "sun") else k): v
         for k, v in facts.COLOURS.items()},
        "What color is {key}?|What colour is {key}?|Which colour has {key}?|What is the color of {key}?"
        "|color of {key}|Tell me the colour of {key}.|What colour does {key} have?",
        "{key} is {value}", "The colour of {key} is {value}")),
    "sound": (2, _lookup(
        facts.SOUNDS,
        "What does {a_key} say?|What sound does {a_key} make?|How does {a_key} sound?"
        "|What noise does {a_key} make?|sound of {a_key}",
        "{a_key} says {value}", "The sound of {a_key} is {value}")),
    "legs": (3, _lookup(
        facts.LEGS,
        "How many legs does {a_key} have?|How many legs has {a_key}?|legs of {a_key}"
        "|What number of legs does {a_key} have?|Tell me how many legs {a_key} has.",
        "{a_key} has {value} legs")),
    "baby": (2, _lookup(
        facts.BABIES,
        "What is a baby {key} called?|What do you call a baby {key}?|What is the baby of {a_key}?"
        "|name of a baby {key}|What is a young {key} called?",
        "A baby {key} is called {a_value}")),
    "home": (2, _lookup(
        facts.HOMES,
        "Where does {a_key} live?|What is the home of {a_key}?|Where do you find {a_key}?"
        "|home of {a_key}|Where can I see {a_key}?",
        "{a_key} lives in the {value}")),
    "day_after": (2, _neighbour(facts.DAYS, "day", 1)),
    "day_before": (2, _neighbour(facts.DAYS, "day", -1)),
    "month_after": (2, _neighbour(facts.MONTHS, "month", 1)),
    "month_before": (2, _neighbour(facts.MONTHS, "month", -1)),
    "opposite": (4, _lookup(
        facts.OPPOSITES,
        "What is the opposite of {key}?|opposite of {key}|Tell me the opposite of {key}."
        "|What's the opposite of {key}?|Which word is the opposite of {key}?",
        "The opposite of {key} is {value}")),
    "capital": (4, _lookup(
        facts.CAPITALS,
        "What is the capital of {key}?|capital of {key}|What's the capital of {key}?"
        "|Which city is the capital of {key}?|Name the capital of {key}.|Tell me the capital of {key}.",
        "The capital of {key} is {value}")),
    "fact": (4, _fact),
    "introduce": (1, _introduce),
    "joke": (1, _joke),
    "story": (5, _story),
    "greeting": (3, _chat(
        "Hello|Hi|Hello!|Hi there!|Hey|Good morning!|Good evening.|Hello there.|Hi, how is it going?",
        "Hi / Hello", "Hello, how can I help you? / Hi, what can I do for you?",
        "Hello there|What can I do for you? / Hi|So good to see you",
        "I bid you good day|How may I be of service?")),
    "how_are_you": (2, _chat(
        "How are you?|How are you today?|How are you doing?|Are you well?|How do you feel?",
        "Fine / Good", "I am fine, thank you / I am doing well",
        "I am doing great", "I am quite well, thank you for asking")),
    "thanks": (2, _chat(
        "Thanks|Thank you!|Thank you very much.|Thanks a lot!|Many thanks.|That helped, thank you.",
        "No problem", "You are welcome / I am glad to help", "", "The honour is entirely mine")),
    "goodbye": (2, _chat(
        "Bye|Goodbye!|See you later.|Good night.|I have to go now.|See you!|Bye bye",
        "Bye", "Goodbye, see you soon / Have a nice day", "", "I wish you a pleasant day")),
    "name": (2, _chat(
        "What is your name?|Who are you?|What are you?|What should I call you?|Tell me your name."
        "|Do you have a name?|Are you a robot?|Are you human?",
        "Alchemist", "I am Alchemist, a small language model / My name is Alchemist")),
    "ability": (2, _chat(
        "What can you do?|How can you help me?|What do you know?|Help|Help me.|What are you good at?",
        "Numbers, animals, colours, stories",
        "I know small numbers, animals, colours and stories",
        "I can add numbers and tell stories|Ask me anything",
        "I am able to add numbers and to tell stories")),
    "learn": (1, _chat(
        "How do you learn?|Do you learn?|Can you learn?|What are votes for?|Do my votes matter?",
        "From votes", "I learn from your votes / Your votes change my answers")),
    "my_name": (1, _chat(
        "What is my name?|Do you know my name?|Who am I?",
        "Unknown", "You have not told me your name")),
    "unknown": (3, _chat(
        "|".join(f"{q}?" for q in facts.OUT_OF_SCOPE) + "|" + "|".join(facts.OUT_OF_SCOPE),
        "No idea", "I do not know that / Sorry, I do not know", "I have no idea",
        "I regret that I do not know")),
}  # fmt: skip
