"""The sandbox's stand-in for RDS's IAM login: PAM asks it whether a token is good.

pam_exec runs it for each login, with what the sandbox would sign, the user in PAM_USER and the
token on standard input. It checks what RDS checks, the SigV4 signature with the sandbox's own
secret key, and logs each attempt, so that a test can tell that no secret arrived at all.
"""

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from botocore.auth import SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

log, host, region, *keys = sys.argv[1:]
user = os.environ["PAM_USER"]
try:
    url = urlsplit("https://" + sys.stdin.read().rstrip("\0\n"))
    fields = dict(parse_qsl(url.query, keep_blank_values=True))
    signature, date = fields.pop("X-Amz-Signature"), fields["X-Amz-Date"]
    age = datetime.now(UTC) - datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    request = AWSRequest("GET", f"https://{url.netloc}{url.path}", params=fields)
    request.context["timestamp"] = date
    signer = SigV4QueryAuth(Credentials(*keys), "rds-db", region)
    text = signer.string_to_sign(request, signer.canonical_request(request))
    asked = url.netloc, fields["Action"], fields["DBUser"], fields["X-Amz-Credential"]
    wanted = host, "connect", user, f"{keys[0]}/{date[:8]}/{region}/rds-db/aws4_request"
    is_valid = timedelta(minutes=-5) <= age <= timedelta(minutes=15)
    good = asked == wanted and is_valid and signature == signer.signature(text, request)
except (KeyError, ValueError):
    good = False
with Path(log).open("a") as attempts:
    print("good" if good else "refused", file=attempts)
sys.exit(not good)
