//! tidepool-ops
