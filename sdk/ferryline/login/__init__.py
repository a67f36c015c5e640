"""Logging a person in with an OIDC issuer, and keeping the tokens (docs/login.md)."""
