"""`mmdit-probe scenes`: the contact sheet, and requests that cannot be met."""

import json

import pytest

from mmdit_probe.cli.app import main


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["scenes", *arguments])
    return stop.value.code, *capsys.readouterr()


def test_show_writes_a_contact_sheet(tmp_path, capsys):
    code, out, _ = call(capsys, "show", "-n", "2", "--json", "--out", str(tmp_path / "run"))
    document = json.loads(out)
    assert code == 0 and len(document["captions"]) == 2
    assert (tmp_path / "run" / "scenes.png").stat().st_size > 5000
    assert (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "--split", "vall"), "did you mean 'val'"),
        (("show", "--kind", "color"), "did you mean 'colour'"),
        (("show", "-n", "0"), "expected at least 1"),
    ],
)
def test_bad_requests_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
