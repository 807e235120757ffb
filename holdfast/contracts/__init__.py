"""The messages that cross the workflow boundary: small and typed, written to history once and read for years.

Every field has a default or is always sent, so that an old history still decodes on newer code. Payloads leave out
fields that hold their default (see `holdfast.engine.client`), so never change a default once it is released.
"""
