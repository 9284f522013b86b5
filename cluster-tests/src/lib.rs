//! tidepool-cluster-tests
