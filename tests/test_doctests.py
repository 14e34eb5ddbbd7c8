"""The examples in docstrings."""

import doctest

import pytest

import cluster.config
import etl.protocol
import etl.table_one
import retrieval.metrics


@pytest.mark.parametrize("module", [cluster.config, etl.protocol, etl.table_one, retrieval.metrics])
def test_examples_hold(module):
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0
