"""A small certificate authority for the servers of a deployment; no private key leaves its machine.

The authority has a folder with its key. A server makes its own key and a request, of which the
authority makes a certificate. Clients trust the authority's certificate.
"""
