//! tidepool-store-core
