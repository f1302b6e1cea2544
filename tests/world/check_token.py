"""The sandbox's stand-in for RDS's IAM login: PAM asks it whether a token is good.

pam_exec runs it once per login attempt, with the user in PAM_USER and the token on standard
input. It checks all that RDS checks: host, port, action, user, access key, region, service,
expiry, and the SigV4 signature, computed anew from the sandbox's own secret key. Every attempt is
appended to a log, so that a test can tell that no secret arrived at all.

usage: check_token.py CONFIG.json
"""

import hmac
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials


def fault(token: str, user: str, config: dict) -> str | None:
    """What is wrong with the token, or None. `config` is what the server knows of itself."""
    url = urlsplit(f"https://{token}")
    fields = dict(parse_qsl(url.query, keep_blank_values=True))
    signature = fields.pop("X-Amz-Signature", "")
    issued = datetime.strptime(fields["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    scope = f"{config['access_key']}/{issued:%Y%m%d}/{config['region']}/rds-db/aws4_request"
    lifetime = timedelta(seconds=min(int(fields["X-Amz-Expires"]), 900))
    now = datetime.now(UTC)
    for wrong, what in (
        (url.netloc != f"{config['host']}:{config['port']}", f"signed for {url.netloc}"),
        (fields.get("Action") != "connect", "another action"),
        (fields.get("DBUser") != user, f"signed for user {fields.get('DBUser')}, not {user}"),
        (fields.get("X-Amz-Credential") != scope, "another key, day, region or service"),
        (not issued - timedelta(minutes=5) <= now <= issued + lifetime, "expired"),
        (not hmac.compare_digest(signature, expected(url, fields, config)), "wrong signature"),
    ):
        if wrong:
            return what
    return None


def expected(url, fields: dict, config: dict) -> str:
    """The SigV4 signature that the sandbox's own secret key gives this URL."""
    request = AWSRequest("GET", f"https://{url.netloc}{url.path}", params=fields)
    request.context["timestamp"] = fields["X-Amz-Date"]
    keys = Credentials(config["access_key"], config["secret_key"])
    signer = SigV4QueryAuth(keys, "rds-db", config["region"])
    canonical = signer.canonical_request(request)
    return signer.signature(signer.string_to_sign(request, canonical), request)


def main() -> int:
    config = json.loads(Path(sys.argv[1]).read_text())
    user = os.environ["PAM_USER"]
    token = sys.stdin.buffer.read().rstrip(b"\0\n").decode(errors="replace")
    try:
        wrong = fault(token, user, config)
    except (KeyError, ValueError) as error:
        wrong = f"not a token: {error!r}"
    with Path(config["log"]).open("a") as log:
        print(json.dumps({"user": user, "length": len(token), "refused": wrong}), file=log)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
