"""Names as the world's class lists, languages and file systems hold them."""

import unicodedata

import pytest

from mutor_vision.errors import UserError
from mutor_vision.names import in_words, known_as, match_class, parse_classes, printable, read_names, same, title

IMAGENET = [
    "tench, Tinca tinca",
    "goldfish, Carassius auratus",
    "crane",
    "crane, lifting machine",
    " padded ",
    "Cafe\u0301",
]


def test_class_names_and_ids():
    assert parse_classes("cat, 0,ant", ["ant", "bee", "cat"]) == [2, 0, 0]


@pytest.mark.parametrize("text, classes", [
    ("tench, Tinca tinca", [0]),
    ("tench, Tinca tinca,goldfish, Carassius auratus", [0, 1]),
    ("goldfish, Carassius auratus, 0,tench", [1, 0, 0]),
    ("tench", [0]), ("Carassius auratus", [1]), ("TENCH,Goldfish", [0, 1]), ("lifting machine", [3]),
    ("crane", [2]),  # a whole name before a synonym
    (" padded ", [4]), ("padded", [4]), ("padded,tench", [4, 0]),
    ("Caf\u00e9", [5]), ("CAF\u00c9", [5]), ("Cafe\u0301", [5]),
])  # fmt: skip
def test_a_name_is_found_before_the_list_is_split(text, classes):
    assert parse_classes(text, IMAGENET) == classes


def test_every_class_can_be_chosen_by_its_very_name():
    awkward = [
        *IMAGENET,
        "1,2",
        "a,b,c",
        "\u05e9\u05dc\u05d5\u05dd",
        "\u732b",
        "new\nline",
        "\udcff",
        "\u00b2",
        "x" * 300,
    ]
    for number, name in enumerate(awkward):
        assert match_class(name, awkward) == number
        assert parse_classes(name, awkward) == [number]


def test_imagenets_ids_are_known_in_words():
    """As folders of ImageNet are named. Two of its classes are cranes."""
    folders = ["n01443537", "n02012849", "n03126707", "n09193705", "n99999999", "tench, Tinca tinca"]
    for text, classes in (
        ("goldfish,alp", [0, 3]), ("Goldfish", [0]), ("goldfish, Carassius auratus", [0]),
        ("Carassius auratus,tench", [0, 5]), ("n01443537,n99999999", [0, 4]),
    ):  # fmt: skip
        assert parse_classes(text, known_as(folders)) == classes
    with pytest.raises(UserError, match=r"'crane' names 2 classes: 1 \('crane'\), 2 \('crane'\)"):
        parse_classes("crane", known_as(folders))
    with pytest.raises(UserError, match="did you mean 'goldfish'"):
        parse_classes("goldfsh", known_as(folders))
    assert [title(name) for name in folders] == ["goldfish", "crane", "crane", "alp", "n99999999", "tench, Tinca tinca"]
    assert in_words("n01443537") == "goldfish, Carassius auratus" and in_words("n1") == "n1"


def test_a_number_is_an_id_in_a_list_and_a_name_by_itself():
    digits = ["0", "1", "10", "2"]  # as folders sort
    assert parse_classes("2,3", digits) == [2, 3]
    assert [match_class(name, digits) for name in digits] == [0, 1, 2, 3]
    assert match_class("3", digits) == 3  # no class has this name


@pytest.mark.parametrize("text, names, message", [
    ("4", ["a"], "class 4 does not exist; this model has classes 0 to 0"),
    ("-1", ["a"], "class -1 does not exist"),
    ("goldfsh", IMAGENET, "did you mean 'goldfish'"),
    ("machine", ["machine, washer", "machine, dryer"], "'machine' names 2 classes: 0 .* 1 .*give one of these ids"),
    ("CAT", ["Cat", "cat"], "names 2 classes"),
    ("", ["a"], "class '' does not exist"), ("a,,b", ["a", "b"], "class '' does not exist"),
    ("\u00b2", ["a"], "does not exist"), ("9" * 5000, ["a"], "does not exist"),
    ("\x1b[31m", ["a"], r"class '\\x1b\[31m' does not exist"),
])  # fmt: skip
@pytest.mark.bad_input("command line")
def test_what_names_no_class_or_several_is_refused(text, names, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_classes(text, names)
    assert "\x1b" not in str(raised.value)


def test_the_hint_is_never_what_was_given():
    for text in ("tench, Tinca tinc", "padde"):
        with pytest.raises(UserError) as raised:
            parse_classes(text, IMAGENET)
        assert f"mean '{text}'" not in str(raised.value)


FIVE = ["ant", "bee", "caf\u00e9", "dog, hound", "\u732b"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_names_are_read_whatever_editor_saved_them(tmp_path, encoding, end):
    text = end.join(["ant ", "\tbee", "", *FIVE[2:], "", " "])
    (tmp_path / "names.txt").write_bytes(text.encode(encoding))
    assert read_names(tmp_path / "names.txt") == FIVE


@pytest.mark.parametrize("content, message", [
    (b"ant\nbee\nant \n", "names a class twice: 'ant' in lines 1 and 3"),
    ("caf\u00e9\ncafe\u0301\n".encode(), "names a class twice"),
    ("caf\u00e9\n".encode("latin-1"), "cannot be read as class names"),
    ("ant\nbee\n".encode("utf-16-le"), "zero bytes"),
])  # fmt: skip
@pytest.mark.bad_input("command line")
def test_lists_that_would_give_wrong_names_are_refused(tmp_path, content, message):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_names(tmp_path / "names.txt")


def test_nothing_in_a_name_reaches_the_terminal_as_a_command():
    shown = printable("a\x1b[31m\n\r\t\x07\u202eb\u2028\udcff\x85c")
    assert shown.isprintable() and shown.startswith("a") and shown.endswith("c")
    shown.encode("utf-8")
    for ordinary in ("tench, Tinca tinca", "caf\u00e9", "\u732b", "\u05e9\u05dc\u05d5\u05dd", r"back\slash"):
        assert printable(ordinary) == ordinary
    assert printable("x" * 100, limit=40) == "x" * 37 + "..."


def test_forms_of_one_name_are_the_same():
    assert len({same(unicodedata.normalize(form, " Caf\u00e9  noir ")) for form in ("NFC", "NFD")}) == 1


def test_a_command_prints_any_name_in_one_line(capfd):
    """Names come into messages in many places; the last one before the terminal sees to them all."""
    from mutor_vision.cli import run_command

    def main():
        print("class \udcff")
        raise UserError("class '\x1b[31m\n\udcff\u202e' does not exist")

    with pytest.raises(SystemExit):
        run_command(main)
    out, error = capfd.readouterr()
    assert out == "class \\udcff\n" and error == "error: class '\\x1b[31m \\udcff\\u202e' does not exist\n"


@pytest.mark.parametrize("content, message", [
    (b"", "holds no name"), (b"\n \r\n", "holds no name"), ("\ufeff".encode(), "holds no name"),
    (b'["ant", "bee"]', "looks like JSON"), (b'{\n"0": "ant",\n"1": "bee"\n}\n', "looks like JSON"),
])  # fmt: skip
def test_a_list_without_names_and_json_are_no_class_names(tmp_path, content, message):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_names(tmp_path / "names.txt")


def test_marks_of_joined_files_are_no_part_of_a_name(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffant\r\n\ufeffbee\r\n{set}\r\n".encode())
    assert read_names(tmp_path / "names.txt") == ["ant", "bee", "{set}"]
