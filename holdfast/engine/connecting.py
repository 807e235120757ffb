"""Explains why a connection to Temporal failed. The SDK gives only the text of its transport's error."""

from __future__ import annotations

import re

from temporalio.envconfig import ClientConfigProfile


def no_connection(where: ClientConfigProfile, error: str) -> str:
    """Returns one line with what is wrong and what to do. error: the text of the error from `Client.connect`."""
    secured = bool(where.api_key or (where.tls and not where.tls.disabled))
    refused = re.search(r"code: (PermissionDenied|Unauthenticated), message: \"([^\"]*)\"", error)
    if refused:
        what = f"{where.address} refuses the key or the certificate ({refused[2]})"
        return f"{what}: check TEMPORAL_API_KEY or TEMPORAL_TLS_CLIENT_CERT_PATH, and TEMPORAL_NAMESPACE"
    if "InvalidCertificate(Expired" in error:
        return f"the certificate of {where.address} has expired: the operator of that server has to renew it"
    if "InvalidCertificate" in error:
        what = f"the certificate of {where.address} is not one that this machine trusts for that name"
        name = "if the certificate is for another name, TEMPORAL_TLS_SERVER_NAME"
        return f"{what}: set TEMPORAL_TLS_SERVER_CA_CERT_PATH and, {name}"
    if "InvalidContentType" in error:
        return f"{where.address} does not speak TLS: unset TEMPORAL_TLS* and TEMPORAL_API_KEY, or correct the address"
    if "transport error" in error:
        if not secured:
            return f"{where.address} ended the connection: if it needs TLS, set TEMPORAL_TLS=true or TEMPORAL_API_KEY"
        what = f"{where.address} ended the connection{_expiry(where)}"
        return f"{what}: check the client certificate that it needs (TEMPORAL_TLS_CLIENT_CERT_PATH, …_KEY_PATH)"
    start = "" if secured else "start one with `uv run starter.py up`, or "
    reasons = re.findall(r'\b(?:message|error): "([^"]*)"', error)
    why = f" ({reasons[-1]})" if reasons else ""
    return f"no Temporal server at {where.address}{why}: {start}set TEMPORAL_ADDRESS"


def _expiry(where: ClientConfigProfile) -> str:
    """Returns until when the client certificate is valid, or that none is set; empty without TLS."""
    settled = where.tls.to_connect_tls_config() if where.tls else False
    if isinstance(settled, bool) or not settled.client_cert:
        return "; no client certificate is set"
    from cryptography import x509  # takes 8 MB, and only this error needs it

    until = x509.load_pem_x509_certificate(settled.client_cert).not_valid_after_utc
    return f"; the client certificate is valid until {until:%Y-%m-%d %H:%M} UTC"
