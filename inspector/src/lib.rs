//! tidepool-inspector
