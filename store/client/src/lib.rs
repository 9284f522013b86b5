//! tidepool-store-client
