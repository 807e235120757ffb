"""What the commands say and do about encryption and large payloads."""

import json
import os
from base64 import b64encode
from pathlib import Path

from holdfast.dev.stack import Stack
from tests.fixtures.stack import Cli, until

KEYS = ",".join(f"{id}:{b64encode(os.urandom(32)).decode()}" for id in ("new", "old"))


def line(cli: Cli, what: str, **environment: str) -> dict[str, str]:
    (found,) = [each for each in json.loads(cli("doctor", "--json", **environment).stdout) if each["what"] == what]
    return found


def test_doctor_says_which_key_encrypts_and_where_large_payloads_go(cli: Cli, tmp_path: Path) -> None:
    assert line(cli, "encryption")["found"] == "off: payloads are in clear text"
    on = line(cli, "encryption", HOLDFAST_ENCRYPTION_KEYS=KEYS)
    assert (on["ok"], on["found"]) == (True, "on, with key new; also decrypts: old")
    assert line(cli, "large payloads")["found"] == "over 65,536 bytes: to store"
    (tmp_path / "file").touch()
    bad = line(cli, "large payloads", HOLDFAST_PAYLOAD_STORE=f"file://{tmp_path}/file/x")
    assert not bad["ok"]
    assert "Not a directory" in bad["found"]


def test_a_key_that_does_not_fit_is_one_line_that_does_not_quote_it(cli: Cli) -> None:
    said = cli("doctor", HOLDFAST_ENCRYPTION_KEYS="k1:hunter2")
    assert said.returncode == 2
    assert "HOLDFAST_ENCRYPTION_KEYS: Value error, entry 1 is not KEY_ID:KEY" in said.stderr
    assert "hunter2" not in said.stderr + said.stdout


def test_the_codec_server_does_not_start_without_a_token_or_for_no_page(cli: Cli) -> None:
    open_to_all = cli("codec-server", HOLDFAST_CODEC_TOKEN="")
    assert (open_to_all.returncode, "HOLDFAST_CODEC_TOKEN is not set" in open_to_all.stderr) == (2, True)
    for_whom = cli("codec-server", "--ui", "nonsense", HOLDFAST_CODEC_TOKEN="x")
    assert (for_whom.returncode, "expected an origin such as" in for_whom.stderr) == (2, True)


def test_claims_are_dropped_only_when_no_run_is_left_that_may_need_them(cli: Cli, stack: Stack) -> None:
    cli("doctor")  # stores one to see whether that works
    run = json.loads(cli("run", "discharge", "--input", '{"patient_id": "pat-1"}', "--json").stdout)
    found = json.loads(cli("payloads", "--older-than", "0", "--json").stdout)
    assert found["payloads"] >= 1
    assert found["workflows_from_before"] >= 1
    refused = cli("payloads", "--older-than", "0", "--drop")
    assert refused.returncode == 2
    assert "take a greater --older-than" in refused.stderr
    dropped = json.loads(cli("payloads", "--older-than", "1", "--drop", "--json").stdout)
    assert (dropped["dropped"], dropped["payloads"] >= 1) == (0, True)
    cli("cancel", run["workflow_id"])
    until(lambda: cli("result", run["workflow_id"]).returncode == 0)
