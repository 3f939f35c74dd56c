"""The schemas of benchmarks/structured.py, written for it: what an answer is about, and what it must fit."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def _object(optional: tuple[str, ...] = (), **properties: Any) -> Schema:
    """All properties are required but the optional ones; no others."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _list(items: Any, least: int = 1, most: int = 3) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _text(least: int = 1, most: int = 30) -> Schema:
    return {"type": "string", "minLength": least, "maxLength": most}


def _integer(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _pattern(pattern: str) -> Schema:
    return {"type": "string", "pattern": pattern}


def _format(name: str) -> Schema:
    return {"type": "string", "format": name}


_POINT = _object(
    x={"type": "number", "minimum": -90, "maximum": 90}, y={"type": "number", "minimum": -180, "maximum": 180}
)
_PERSON = _object(name=_text(), age=_integer(0, 120))
_TREE: Schema = {
    "$defs": {"node": _object(("children",), label=_text(most=10), children=_list({"$ref": "#/$defs/node"}, 0, 2))},
    "$ref": "#/$defs/node",
}

SCHEMAS: dict[str, Schema] = {
    # objects
    "a person": _PERSON,
    "a city": _object(
        name=_text(), country=_text(), population=_integer(1000, 40_000_000), capital={"type": "boolean"}
    ),
    "a book": _object(title=_text(most=40), author=_PERSON, year=_integer(1450, 2030), genres=_list(_text(most=12))),
    "a company": _object(name=_text(), address=_object(street=_text(), city=_text(), zip=_pattern("^[0-9]{5}$"))),
    "a film": _object(
        ("rating",), title=_text(), director=_text(), rating={"type": "number", "minimum": 0, "maximum": 10}
    ),
    "an animal": _object(species=_text(), legs=_integer(0, 8), habitat={"enum": ["land", "water", "air"]}),
    "a recipe": _object(name=_text(), minutes=_integer(1, 240), steps=_list(_text(most=40), 2, 4)),
    "a song": _object(title=_text(), artist=_text(), seconds=_integer(30, 900), explicit={"type": "boolean"}),
    "a planet": _object(name=_text(), moons=_integer(0, 100), rings={"type": "boolean"}, mass={"type": "number"}),
    "a football match": _object(
        home=_object(team=_text(), goals=_integer(0, 9)), away=_object(team=_text(), goals=_integer(0, 9))
    ),
    "a bank account": _object(
        owner=_PERSON, balance={"type": "number", "minimum": 0}, currency={"enum": ["EUR", "USD", "GBP"]}
    ),
    "a school class": _object(grade=_integer(1, 13), teacher=_PERSON, pupils=_list(_PERSON, 1, 2)),
    # enumerations and constants
    "a traffic light": _object(colour={"enum": ["red", "amber", "green"]}),
    "a verdict": {"enum": ["yes", "no", "maybe"]},
    "a die": {"enum": [1, 2, 3, 4, 5, 6]},
    "a version tag": _object(kind={"const": "version"}, major=_integer(0, 99), minor=_integer(0, 99)),
    "a mood": _object(mood={"enum": ["happy", "sad", "angry", "calm"]}, intensity=_integer(1, 10)),
    "a mixed list of constants": {"enum": [None, True, 0, "zero", [0], {"zero": 0}]},
    "a ticket": _object(
        type={"const": "ticket"}, priority={"enum": ["low", "normal", "high"]}, open={"type": "boolean"}
    ),
    "a playing card": _object(suit={"enum": ["hearts", "spades", "clubs", "diamonds"]}, rank=_integer(1, 13)),
    # numbers
    "a temperature": _object(celsius={"type": "number", "minimum": -273.15, "maximum": 100}),
    "a probability": _object(p={"type": "number", "minimum": 0, "maximum": 1}),
    "an open interval": _object(value={"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
    "a price": _object(amount={"type": "number", "minimum": 0, "maximum": 1000, "multipleOf": 0.01}),
    "an even number": _object(even={"type": "integer", "minimum": 0, "maximum": 1000, "multipleOf": 2}),
    "a negative number": _object(debt=_integer(-5000, -1)),
    "a list of primes": _list(_integer(2, 97), 3, 6),
    "a point on earth": _POINT,
    "a route": _object(stops=_list(_POINT, 2, 3)),
    # strings
    "a telephone number": _object(phone=_pattern(r"^\+[0-9]{2} [0-9]{3} [0-9]{4,7}$")),
    "a licence plate": _object(plate=_pattern("^[A-Z]{1,3}-[A-Z]{2} [0-9]{1,4}$")),
    "a hexadecimal colour": _object(colour=_pattern("^#[0-9a-f]{6}$"), name=_text()),
    "a date": _object(date=_format("date"), holiday=_text()),
    "a meeting": _object(starts=_format("date-time"), topic=_text()),
    "a time of day": _object(time=_format("time")),
    "a mail address": _object(mail=_format("email")),
    "a computer": _object(host=_text(most=12), ip=_format("ipv4")),
    "an identifier": _object(id=_format("uuid")),
    "a user name": _object(user=_pattern("^[a-z][a-z0-9_]{2,11}$")),
    "a word": {"type": "string", "minLength": 3, "maxLength": 12},
    "a semantic version": _object(version=_pattern(r"^[0-9]{1,2}\.[0-9]{1,2}\.[0-9]{1,2}(-(alpha|beta))?$")),
    "a chess move": _object(move=_pattern("^[KQRBN]?[a-h][1-8]$")),
    "an isbn": _object(isbn=_pattern("^97[89]-[0-9]{10}$"), title=_text()),
    # lists
    "three colours": _list({"enum": ["red", "green", "blue", "white", "black"]}, 3, 3),
    "a shopping list": _list(_object(item=_text(most=15), count=_integer(1, 20)), 2, 4),
    "a matrix": _list(_list(_integer(0, 9), 2, 2), 2, 2),
    "a pair": {"type": "array", "prefixItems": [_text(), _integer(0, 9)], "items": False, "minItems": 2},
    "a list that may be empty": _list(_text(most=8), 0, 2),
    "booleans": _list({"type": "boolean"}, 4, 4),
    # choices between schemas
    "a number or a text": _object(value={"anyOf": [_integer(0, 99), _text(most=10)]}),
    "a nullable text": _object(nickname={"type": ["string", "null"], "maxLength": 10}),
    "a shape": {
        "anyOf": [
            _object(kind={"const": "circle"}, radius=_integer(1, 100)),
            _object(kind={"const": "square"}, side=_integer(1, 100)),
        ]
    },
    "a payment": _object(
        method={
            "anyOf": [
                _object(type={"const": "card"}, number=_pattern("^[0-9]{4}( [0-9]{4}){3}$")),
                _object(type={"const": "cash"}, note={"enum": [5, 10, 20, 50]}),
            ]
        }
    ),
    "an employee": {
        "allOf": [
            _PERSON | {"additionalProperties": True},
            {"type": "object", "properties": {"role": _text(most=10)}, "required": ["role"]},
        ]
    },
    # references and maps
    "a family": {
        "$defs": {"person": _PERSON},
        **_object(mother={"$ref": "#/$defs/person"}, child={"$ref": "#/$defs/person"}),
    },
    "a tree": _TREE,
    "an invoice": {
        "$defs": {"line": _object(text=_text(most=15), price={"type": "number", "minimum": 0, "maximum": 999})},
        **_object(
            number=_pattern("^R[0-9]{4}$"), lines=_list({"$ref": "#/$defs/line"}, 1, 3), paid={"type": "boolean"}
        ),
    },
    "word counts": {"type": "object", "additionalProperties": _integer(1, 99), "minProperties": 1, "maxProperties": 3},
    "a deep nest": _object(a=_object(b=_object(c=_object(d=_object(e={"enum": ["here", "there"]}))))),
}
