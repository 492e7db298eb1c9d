"""Setup lines: which of them are one command, and what is refused before a job is submitted."""

import shutil

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.launch import cli
from bagualu.launch.batch.setup_lines import check, commands

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.mark.parametrize(
    "lines",
    [
        ["module load cuda", "source 'my env/bin/activate'"],
        ["false || true", "ls | head -n 1 > /dev/null", "[ -d /a ] && cd /a || cd /"],
        ["# a comment", "", "   "],
        ["f() { echo hi; }", "f &", "x=$(( 1 + 2 )); echo ${x:-3}"],
        ["shopt -s extglob", "ls !(a|b)"],
        ["echo a\\\\"],
    ],
)
def test_lines_that_stand_alone_stay_alone(lines):
    check(lines)
    assert commands(lines) == lines


@pytest.mark.parametrize(
    "lines",
    [
        ["if true; then", "module load cuda", "fi"],
        ["f() {", "echo hi", "}"],
        ["for i in 1 2", "do", "echo $i", "done"],
        ["cat > /tmp/x <<END", "fi", "END"],
        ["echo 'a", "b'"],
        ["echo a \\", "b"],
        ["true &&", "false"],
        ["[[ a == a", "&& b == b ]]"],
    ],
)
def test_lines_that_only_together_are_a_command_run_together(lines):
    check(lines)
    assert commands(["true", *lines, "false"]) == ["true", "\n".join(lines), "false"]


@pytest.mark.parametrize(
    ("lines", "named", "complaint"),
    [
        (["true", "fi"], "'fi'", "syntax error near unexpected token"),
        (["if true; then", "true"], "'if true; then'", "unexpected end of file"),
        (['echo "it', "true"], "'echo \"it'", "unexpected EOF while looking for matching"),
        (["true", "}"], "'}'", "unexpected token `}'"),
        (["f() {", "a ;; b", "}"], "'a ;; b'", "unexpected token `;;'"),
        (["cat <<END", "true"], "'cat <<END'", "here-document"),
        (["true \\"], "'true ", "backslash"),
        (["source (x)"], "'source (x)'", "unexpected token `x'"),
    ],
)
def test_a_line_that_bash_cannot_parse_is_refused_by_name(lines, named, complaint):
    with pytest.raises(RecipeError) as refused:
        check(lines)
    assert named in str(refused.value)
    assert complaint in str(refused.value)


def test_it_is_refused_before_the_job_is_submitted(capsys, tmp_path):
    assert cli.main(["slurm", f"run.dir={tmp_path}/run", "launch.slurm.setup=['module load (cuda']"]) == 2
    assert "launch.slurm.setup: bash cannot parse 'module load (cuda'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
