from tests.lab.toy_suite import checked, origin, suite

__all__ = ["checked", "origin", "suite"]
