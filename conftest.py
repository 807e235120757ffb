pytest_plugins = ["tests.fixtures.store", "tests.fixtures.temporal", "tests.fixtures.stack", "tests.fixtures.checkout"]
