"""Errors of the layer between processes.

ProtocolError
├── LocalProtocolError    we broke a rule: a bug here
├── PeerProtocolError     a peer sent what no peer should send
├── PeerGoneError         a peer has ended; a state to handle, not a bug
└── SharingError          memory cannot be shared as things are set up; the message says what to change
"""

from __future__ import annotations


class ProtocolError(Exception):
    """Base of the tree; never raised itself."""


class LocalProtocolError(ProtocolError, RuntimeError):
    pass


class PeerProtocolError(ProtocolError, ValueError):
    pass


class PeerGoneError(ProtocolError, ConnectionError):
    pass


class SharingError(ProtocolError, RuntimeError):
    pass
