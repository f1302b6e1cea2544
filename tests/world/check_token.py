"""The sandbox's stand-in for RDS's IAM login: PAM asks it whether a token is good.

pam_exec runs it for each login, with the sandbox's settings, the user in PAM_USER and the token on
standard input. It checks what RDS checks, the SigV4 signature with the sandbox's own secret key,
and logs each attempt, so that a test can tell that no secret arrived at all.
"""

import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

config, user = json.loads(Path(sys.argv[1]).read_text()), os.environ["PAM_USER"]
try:
    url = urlsplit("https://" + sys.stdin.read().rstrip("\0\n"))
    fields = dict(parse_qsl(url.query, keep_blank_values=True))
    signature, date = fields.pop("X-Amz-Signature"), fields["X-Amz-Date"]
    age = datetime.now(UTC) - datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    scope = f"{config['access_key']}/{date[:8]}/{config['region']}/rds-db/aws4_request"
    request = AWSRequest("GET", f"https://{url.netloc}{url.path}", params=fields)
    request.context["timestamp"] = date
    keys = Credentials(config["access_key"], config["secret_key"])
    signer = SigV4QueryAuth(keys, "rds-db", config["region"])
    text = signer.string_to_sign(request, signer.canonical_request(request))
    asked = url.netloc, fields["Action"], fields["DBUser"]
    checks = {
        "another host, action or user": asked == (config["host"], "connect", user),
        "another key, day, region or service": fields["X-Amz-Credential"] == scope,
        "expired": timedelta(minutes=-5) <= age <= timedelta(minutes=15),
        "wrong signature": signature == signer.signature(text, request),
    }
    refused = next((what for what, right in checks.items() if not right), None)
except (KeyError, ValueError) as error:
    refused = f"not a token: {error!r}"
with Path(config["log"]).open("a") as log:
    print(json.dumps({"refused": refused}), file=log)
sys.exit(refused is not None)
