"""The protocol between client and trunk, as data: messages, tensor bytes, legal order."""
