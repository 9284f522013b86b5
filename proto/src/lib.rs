//! tidepool-proto
