"""What two services share: TLS, sessions, the error middleware, health, metrics, logs and the program frame."""
