"""The sandbox's stand-in for RDS's IAM login: PAM asks it whether a token is good.

pam_exec runs it for each login, with the sandbox's settings, the user in PAM_USER and the token on
standard input. It checks what RDS checks, the SigV4 signature with the sandbox's own secret key,
and logs each attempt, so that a test can tell that no secret arrived at all.
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
    age, lifetime = datetime.now(UTC) - issued, min(int(fields["X-Amz-Expires"]), 900)
    request = AWSRequest("GET", f"https://{url.netloc}{url.path}", params=fields)
    request.context["timestamp"] = fields["X-Amz-Date"]
    keys = Credentials(config["access_key"], config["secret_key"])
    signer = SigV4QueryAuth(keys, "rds-db", config["region"])
    text = signer.string_to_sign(request, signer.canonical_request(request))
    checks = {
        f"signed for {url.netloc}": url.netloc == f"{config['host']}:{config['port']}",
        "another action": fields.get("Action") == "connect",
        f"signed for user {fields.get('DBUser')}, not {user}": fields.get("DBUser") == user,
        "another key, day, region or service": fields.get("X-Amz-Credential") == scope,
        "expired": timedelta(minutes=-5) <= age <= timedelta(seconds=lifetime),
        "wrong signature": hmac.compare_digest(signature, signer.signature(text, request)),
    }
    return next((what for what, right in checks.items() if not right), None)


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
